"""bench/throughput.py: equal weights, equal losses, whole rows, and one contestant's end is not the others'."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import throughput
import throughput_rows
from contestants import CONTESTANTS

SMALL = ["--device", "cpu", "--seq", "16", "--micro-batch", "2", "--steps", "2", "--warmup", "1", "--rounds", "2"]
ABLE = [name for name in CONTESTANTS if CONTESTANTS[name].missing("cpu") is None]

# The script itself, with three contestants more: two that raise and one that is ended from outside.
WITH_FAILURES = """
import os, signal, sys
import contestants, throughput, torch

def raises(workload):
    raise MemoryError("no room for this one\\nand more")

def fills(workload):
    raise torch.OutOfMemoryError("CUDA out of memory.\\nTried to allocate")

dies = lambda workload: os.kill(os.getpid(), signal.SIGKILL)
contestants.CONTESTANTS |= {
    name: contestants.Contestant(build) for name, build in {"raises": raises, "fills": fills, "dies": dies}.items()
}
if __name__ == "__main__":
    sys.exit(throughput.main())
"""
FAILED = {
    "dies": ("failed", "ended by SIGKILL"),
    "raises": ("failed", "MemoryError: no room for this one"),
    "fills": ("out of memory", "OutOfMemoryError: CUDA out of memory."),
}


@pytest.fixture(scope="module")
def done(run_bench, tmp_path_factory):
    """What is printed of two rounds of those who fail and of every contestant of a CPU, and their rows by name."""
    script = tmp_path_factory.mktemp("script") / "with_failures.py"
    script.write_text(WITH_FAILURES)
    names = ",".join([*FAILED, *CONTESTANTS])
    finished = run_bench(script, *SMALL, "--contestants", names, "--out", str(script.with_name("rows.json")))
    assert finished.returncode == 0, finished.stdout
    rows = json.loads(script.with_name("rows.json").read_text())
    return finished.stdout, {row["contestant"]: row for row in rows}


def test_every_contestant_is_a_row_and_who_fails_does_not_stop_the_others(done):
    said, rows = done
    assert list(rows) == [*FAILED, *CONTESTANTS]
    for name, row in rows.items():
        missing = CONTESTANTS[name].missing("cpu") if name in CONTESTANTS else None
        expected = FAILED.get(name) or (("missing", missing) if missing else ("measured", None))
        assert (row["status"], row["error"]) == expected
        assert row["rounds"] == (2 if row["status"] == "measured" else 1)
        assert row["versions"].keys() >= {"torch", "transformers", "triton", "python", "cuda", "driver", "peft"}
        assert "with_failures.py --device cpu --seq 16" in row["command"]
        assert any(line.startswith(name) or name in line.split(": ")[0].split(", ") for line in said.splitlines())
    assert {"ours", "ours-block", "hf", "hf-checkpointing", "hf-checkpointing-trained", "full"} <= set(ABLE)
    assert ("lora" in ABLE) is (find_spec("peft") is not None)
    assert "NOT COMPARABLE" not in said


def test_what_was_not_measured_has_no_figures(done):
    for row in done[1].values():
        figures = {key for key in throughput_rows.MEASURED if row[key] is not None}
        of_a_cpu = set(throughput_rows.MEASURED) - {"share_of_peak"}  # no data sheet says its peak
        assert figures == (of_a_cpu if row["status"] == "measured" else set())


def measured(rounds):
    return [
        {"contestant": n, "status": "measured", "round_tokens_per_s": r, "tokens_per_s": r[0], "size": "7b",
         "trains": "adapters" if n == "lora" else "new blocks", "device": "NVIDIA H200"}
        for n, r in rounds.items()
    ]  # fmt: skip


def test_a_ratio_has_an_interval_over_the_rounds_that_both_have_had():
    """By hand: of 1.1, 1.2 and 1.3 the mean is 1.2 and the deviation 0.1; t of two degrees is 4.303."""
    rounds = {
        "ours": [100.0, 200.0, 100.0, 100.0],
        "ours-fp8": [121.0, 264.0],
        "hf": [110.0, 240.0, 130.0],
        "x": [90.0],
    }
    rows = [*measured(rounds), {"contestant": "dead", "status": "failed", "round_tokens_per_s": None}]
    lines = throughput_rows.intervals(rows)
    assert lines[1] == f"hf: 1.2000 +- {4.303 * 0.1 / 3**0.5:.4f} of ours in 3 rounds (95 %)"
    assert [line.split(" of ")[1] for line in lines] == [
        "ours in 2 rounds (95 %)", "ours in 3 rounds (95 %)", "hf in 2 rounds (95 %)"
    ]  # fmt: skip
    assert lines[2].startswith("ours-fp8: 1.1000 +- 0.0000")


def test_what_is_aimed_at_is_said_to_be_met_or_not_where_it_is_meant():
    faster = {"lora": [20_000.0], "hf-compile-fp8-bf16": [18_000.0]}
    rows = measured({"ours": [15_000.0], "ours-fp8": [17_000.0], "hf": [14_900.0], "hf-liger": [15_100.0]} | faster)
    assert throughput_rows.aims(rows) == [
        "aim of ours: 15200, found 15000: NOT MET", "aim of ours-fp8: 1.12, found 1.12583: MET"
    ]  # fmt: skip
    assert throughput_rows.aims([row | {"size": "8b"} for row in rows]) == []
    assert throughput_rows.aims(rows[:2]) == ["aim of ours: 15200, found 15000: NOT MET"]


def test_the_speed_is_that_of_the_median_step(done):
    for name in ABLE:
        row = done[1][name]
        assert len(row["round_tokens_per_s"]) == 2
        assert row["tokens_per_s"] == pytest.approx(16 * 2 / row["step_s"]["median"], rel=1e-3)
        assert row["step_s"]["p10"] <= row["step_s"]["median"] <= row["step_s"]["p90"]
        assert row["tflops"] < row["tflops_flash"]
        assert row["share_of_product"] == pytest.approx(row["tflops"] / row["product_tflops"], abs=1e-3)


def test_everybody_starts_as_the_same_function_and_those_alike_from_equal_bits(done):
    rows = [done[1][name] for name in ABLE]
    for row in rows:
        # fp32: the same sums in another order
        assert row["first_loss"] == pytest.approx(rows[0]["first_loss"], rel=1e-5)
        assert row["loss"] != row["first_loss"]
    for trains in ("new blocks", "adapters", "everything"):
        alike = [row for row in rows if row["trains"] == trains]
        for key in ("weights_digest", "trained_parameters", "parameters", "gflop_per_token"):
            assert len({row[key] for row in alike}) <= 1
        assert all(row["loss"] == pytest.approx(alike[0]["loss"], rel=1e-4) for row in alike)
    assert len({row["weights_digest"] for row in rows}) == 2  # the expanded model's and the base's


def test_a_row_counts_the_work_of_what_it_trains(done):
    full = done[1]["full"]
    assert full["trained_parameters"] == full["parameters"] < done[1]["ours"]["parameters"]
    # Of the base: two products a weight forward and backward to the input, and two for the weight's gradient.
    weights = full["parameters"] - 4096 * 256 - 17 * 256
    attention = 3 * 8 * 4 * 256 * 16 / 2
    assert full["gflop_per_token"] == pytest.approx((6 * weights + attention) / 1e9, rel=1e-9)


def test_what_is_not_comparable_is_said(done):
    rows = [dict(done[1][name]) for name in ("ours", "hf", "full")]
    assert throughput_rows.incomparable(rows) == []
    rows[1]["weights_digest"] = rows[2]["weights_digest"]
    rows[2]["first_loss"] *= 1.00002
    said = throughput_rows.incomparable(rows)
    assert said[0] == "NOT COMPARABLE: contestants started from different weights"
    assert said[1].startswith("NOT COMPARABLE: the first loss of full is")
    assert len(said) == 2


def test_without_time_all_are_missing(tmp_path):
    out = tmp_path / "rows.json"
    assert throughput.main([*SMALL, "--budget", "0", "--contestants", "ours,hf-bf16", "--out", str(out)]) == 0
    errors = [(row["status"], row["error"]) for row in json.loads(out.read_text())]
    assert errors == [("missing", "not run: the time budget was used up"), ("missing", "needs a GPU")]


@pytest.mark.parametrize("arguments", [["--contestants", "theirs"], ["--seq", "1"], ["--seq", "16", "--document", "5"]])
def test_a_wrong_argument_is_told(capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        throughput.main(arguments)
    assert f"{arguments[-2]}: " in capsys.readouterr().err
