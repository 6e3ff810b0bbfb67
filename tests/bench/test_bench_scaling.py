"""bench/scaling.py: the planner beside what is counted, in the small; and that it would say so if they differed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import scaling
import torch


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """The bench over two axes of tiny points: exit code, lines, rows."""
    base = replace(scaling.base_point("cpu"), layers=2, hidden=64, seq=16, after=(0,))
    axes = {
        "tokens": {"16": base, "48": replace(base, micro_batch=3)},
        "new blocks": {"2": replace(base, after=(0, 1))},
    }
    monkeypatch.setattr(scaling, "axes", lambda _: axes)
    threads = torch.get_num_threads()

    def run() -> tuple[int, list[str], list[dict]]:
        code = scaling.main(["--device", "cpu", "--out", str(tmp_path / "scaling.json")])
        return code, capsys.readouterr().out.splitlines(), json.loads((tmp_path / "scaling.json").read_text())["rows"]

    yield run
    torch.set_num_threads(threads)  # the bench sets one for its process


def test_memory_and_work_are_as_planned(run):
    code, lines, rows = run()
    assert code == 0
    assert lines[-1].startswith("AS PLANNED: memory within 0.")
    assert [(row["axis"], row["point"]) for row in rows] == [("tokens", "16"), ("tokens", "48"), ("new blocks", "2")]
    assert all(row["attention_flops"] > 0 for row in rows)


@pytest.mark.parametrize("key", ["peak_bytes", "product_flops", "attention_flops"])
def test_ends_with_1_where_memory_or_a_flop_is_off(run, monkeypatch, key):
    right = scaling.predict
    more = {"peak_bytes": 1.06}.get(key, 1.0)
    monkeypatch.setattr(scaling, "predict", lambda point: right(point) | {key: int(right(point)[key] * more) + 1})
    code, lines, _ = run()
    assert code == 1
    assert all(f"{key} " in line and "the planner says" in line for line in lines[-3:])
