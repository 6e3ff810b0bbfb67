"""bench/step_profile.py: its sums are of what was profiled, and a step's products are those that must be."""

from __future__ import annotations

import gzip
import json

import pytest
import step_profile


def test_a_profile(tmp_path):
    out, trace = tmp_path / "profile.json", tmp_path / "trace.json.gz"
    assert step_profile.main(["--device", "cpu", "--out", str(out), "--trace", str(trace)]) == 0
    result = json.loads(out.read_text())
    kernels = {row["kernel"]: row for row in result["kernels"]}
    assert sum(row["share"] for row in kernels.values()) == pytest.approx(1)
    assert sum(row["calls"] for row in kernels.values()) == pytest.approx(result["launches"])
    assert 0 < kernels["aten::mm"]["ms"] < result["step_ms"]
    # 10 blocks of four products forward, dX from the lowest trained block (4) up but its q/k/v, dW of two, the head.
    assert kernels["aten::mm"]["calls"] == 10 * 4 + (6 * 4 - 1) + 2 * 4 + 2
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == step_profile.STEP for event in events) >= 2


def test_busy_is_the_length_of_the_union():
    assert step_profile.busy([(0, 4), (1, 2)]) == 4
    assert step_profile.busy([(0, 2), (1, 3), (7, 8)]) == 4
