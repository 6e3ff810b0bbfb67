"""bench/scaling.py: the planner beside what is counted, in the small; and that it would say so if they differed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import scaling


@pytest.fixture
def small(monkeypatch):
    """Two axes of tiny points."""
    base = replace(scaling.base_point("cpu"), layers=2, hidden=64, seq=16, after=(0,))
    every = scaling.axes(replace(base, layers=4, after=(1, 3)))
    wanted = {
        "sequences in a micro-batch": [("1", base), ("3", replace(base, micro_batch=3))],
        "where new blocks stand": every["where new blocks stand"][::3],
    }
    monkeypatch.setattr(scaling, "axes", lambda _: wanted)


def run(tmp_path, capsys):
    out, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    code = scaling.main(["--device", "cpu", "--rounds", "1", "--out", str(out), "--picture", str(picture)])
    return code, capsys.readouterr().out.splitlines()[-1], json.loads(out.read_text()), picture


def test_memory_and_products_are_as_planned(small, tmp_path, capsys):
    code, last, result, picture = run(tmp_path, capsys)
    assert code == 0
    assert last.startswith("AS PLANNED: memory within 0.")
    assert [row["point"] for row in result["rows"]] == ["1", "3", "top", "bottom"]
    assert {"device", "commit", "versions", "command"} <= result.keys()
    assert all(row["seconds"] > 0 and row["seconds_predicted"] > 0 for row in result["rows"])
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(("broken", "words"), [("total", "memory is off by +6"), ("dx", "FLOPs of products")])
def test_ends_with_1_where_the_plan_is_wrong(small, tmp_path, capsys, monkeypatch, broken, words):
    if broken == "total":
        right = scaling.Point.predicted.fget

        def too_much(point):
            found = right(point)
            more = found.memory.total * 6 // 100 + 1
            return replace(found, memory=replace(found.memory, transient=found.memory.transient + more))

        monkeypatch.setattr(scaling.Point, "predicted", property(too_much))
    else:
        monkeypatch.setattr(scaling, "by_kind", lambda counter, name: {"products made": 1})
    code, last, _, _ = run(tmp_path, capsys)
    assert code == 1
    assert words in last


def test_every_axis_changes_one_thing():
    base = scaling.base_point("cpu")
    for axis, points in scaling.axes(base).items():
        assert len(points) == 4, axis
        for name, point in points:
            changed = {field for field in vars(base) if getattr(point, field) != getattr(base, field)}
            assert changed <= {"micro_batch", "seq", "layers", "hidden", "after"}
            assert len(changed - {"after"}) <= 1, (axis, name)
            assert point.micro_batch * point.seq <= 2048
