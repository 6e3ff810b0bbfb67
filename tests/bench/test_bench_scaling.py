"""bench/scaling.py: the planner beside what is counted, in the small; and that it would say so if they differed."""

from __future__ import annotations

import gc
import json
from dataclasses import replace

import pytest
import scaling
import torch


@pytest.fixture
def one_thread():
    """The bench sets it for its process; the other tests want theirs back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch, one_thread):
    """Three axes of tiny points."""
    base = replace(scaling.base_point("cpu"), layers=2, hidden=64, seq=16, after=(0,))
    every = scaling.axes(replace(base, layers=4, after=(1, 3)))
    wanted = {
        "tokens of a micro-batch": [("16", base), ("48", replace(base, micro_batch=3))],
        "tokens of a sequence": every["tokens of a sequence"][::3],
        "where new blocks stand": every["where new blocks stand"][::3],
    }
    monkeypatch.setattr(scaling, "axes", lambda _: wanted)
    return wanted


@pytest.fixture
def one_axis(monkeypatch, small):
    """Of two points, and without the picture."""
    name = "where new blocks stand"
    monkeypatch.setattr(scaling, "axes", lambda _: {name: small[name]})
    monkeypatch.setattr(scaling, "draw", lambda *_: None)


def run(tmp_path, capsys):
    out, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    code = scaling.main(["--device", "cpu", "--rounds", "1", "--out", str(out), "--picture", str(picture)])
    return code, capsys.readouterr().out.splitlines(), json.loads(out.read_text()), picture


def test_memory_and_work_are_as_planned(small, tmp_path, capsys):
    code, lines, result, picture = run(tmp_path, capsys)
    assert code == 0
    assert lines[-1].startswith("AS PLANNED: memory within 0.")
    assert max(len(line) for line in lines if not line.startswith("written to")) <= 110
    rows = result["rows"]
    assert [row["point"] for row in rows] == ["16", "48", "16", "128", "top", "bottom"]
    assert [row["tokens"] for row in rows] == [16, 48, 128, 128, 16, 16]
    assert {"device", "commit", "versions", "command", "clock"} <= result.keys()
    assert all(row["seconds"] > 0 and row["seconds_predicted"] > 0 for row in rows)
    assert all(row["attention_flops"] > 0 for row in rows)
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("sign", [1, -1])
def test_ends_with_1_where_memory_is_off(one_axis, tmp_path, capsys, monkeypatch, sign):
    right = scaling.Point.predicted.fget

    def off(point):
        found = right(point)
        more = sign * found.memory.total * 6 // 100
        return replace(found, memory=replace(found.memory, transient=found.memory.transient + more))

    monkeypatch.setattr(scaling.Point, "predicted", property(off))
    code, lines, _, _ = run(tmp_path, capsys)
    assert code == 1
    assert all(f"the planner's memory is off by {'+' if sign > 0 else '-'}" in line for line in lines[-2:])


@pytest.mark.parametrize("kind", ["product", "attention"])
def test_ends_with_1_where_a_flop_is_off(one_axis, tmp_path, capsys, monkeypatch, kind):
    by_kind = scaling.by_kind

    def one_more(counter, name):
        return {key: flops + key.startswith(kind) for key, flops in by_kind(counter, name).items()}

    monkeypatch.setattr(scaling, "by_kind", one_more)
    code, lines, _, _ = run(tmp_path, capsys)
    assert code == 1
    assert all(f"{kind} FLOPs, the planner says" in line for line in lines[-2:])
    assert any("+0.00%" in line or "-0.00%" in line for line in lines)


@pytest.mark.parametrize(("percent", "accepted"), [(4.9, True), (5.1, False), (-4.9, True), (-5.1, False)])
def test_five_percent_is_the_bound(percent, accepted):
    row = {"axis": "width", "point": "1", "peak_bytes": 100_000, "product_flops": 7, "attention_flops": 7}
    row |= {"product_flops_predicted": 7, "attention_flops_predicted": 7}
    row["peak_bytes_predicted"] = round(100_000 * (1 + percent / 100))
    assert (scaling.wrong([row]) == []) is accepted


def test_what_is_there_before_a_step_is_all_counted(one_thread):
    gc.collect()
    held = living_tensors()  # held, or their places would be given to new ones
    before = {tensor.untyped_storage().data_ptr() for tensor in held}
    point = replace(scaling.base_point("cpu"), layers=2, hidden=64, seq=16, after=(0,))
    measured = scaling.Measured(point)
    measured.step()
    gc.collect()
    alive = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in living_tensors()}
    new = sum(size for place, size in alive.items() if place not in before)
    del held
    # The tokens before they are a batch, and a few scalars: the loss' scale, the optimizer's flags.
    assert measured.own_bytes() <= new <= measured.own_bytes() + measured.tokens.nbytes + 64


def living_tensors():
    """With memory of their own: other tests may have left fake ones and ones on no device."""
    kinds = (torch.Tensor, torch.nn.Parameter)
    return [thing for thing in gc.get_objects() if type(thing) in kinds and thing.device.type != "meta"]


def test_every_axis_changes_one_thing():
    base = scaling.base_point("cpu")
    for axis, points in scaling.axes(base).items():
        assert len(points) == 4, axis
        for name, point in points:
            changed = {field for field in vars(base) if getattr(point, field) != getattr(base, field)}
            if axis == "tokens of a sequence":
                assert changed <= {"micro_batch", "seq"}
                assert point.micro_batch * point.seq == 1024
            else:
                assert changed <= {"micro_batch", "layers", "hidden", "after"}
                assert len(changed - {"after"}) <= 1, (axis, name)
            assert point.micro_batch * point.seq <= 1024
