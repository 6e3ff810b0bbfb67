"""bench/throughput.py: equal weights, equal losses, whole rows, and one contestant's end is not the others'."""

from __future__ import annotations

import json

import pytest

REQUIRED = {
    "device": str,
    "size": str,
    "contestant": str,
    "tokens_per_s": float,
    "peak_gib": float,
    "loss": float,
    "seq": int,
    "micro_batch": int,
    "dtype": str,
    "commit": str,
    "versions": dict,
    "command": str,
}
SMALL = ["--device", "cpu", "--seq", "16", "--micro-batch", "2", "--steps", "3", "--warmup", "1"]

# The script itself, with two contestants more: one that raises and one that is ended from outside.
WITH_FAILURES = """
import os, signal, sys
import contestants, throughput

def raises(workload):
    raise MemoryError("no room for this one\\nand more")

contestants.CONTESTANTS |= {"raises": raises, "dies": lambda workload: os.kill(os.getpid(), signal.SIGKILL)}
if __name__ == "__main__":
    sys.exit(throughput.main())
"""


@pytest.fixture(scope="module")
def done(run_bench, tmp_path_factory):
    """Two rounds of every contestant of a CPU, and their rows by name."""
    out = tmp_path_factory.mktemp("results") / "rows.json"
    finished = run_bench("throughput.py", *SMALL, "--rounds", "2", "--out", str(out))
    assert finished.returncode == 0, finished.stdout
    return finished.stdout, {row["contestant"]: row for row in json.loads(out.read_text())}


def test_a_row_says_what_was_measured_where_and_how(done):
    _, rows = done
    assert list(rows) == ["ours", "hf", "hf-checkpointing"]
    for row in rows.values():
        for key, kind in REQUIRED.items():
            assert type(row[key]) is kind, key
        assert row["versions"].keys() >= {"torch", "transformers", "triton", "python", "cuda", "driver"}
        assert row["command"].startswith("python bench/throughput.py --device cpu --seq 16")
        assert (row["seq"], row["micro_batch"], row["steps"], row["warmup"]) == (16, 2, 3, 1)
        assert (row["rounds"], len(row["round_tokens_per_s"])) == (2, 2)
        assert row["tokens_per_s"] > 0
        assert row["error"] is None


def test_the_speed_is_that_of_the_median_step(done):
    for row in done[1].values():
        assert row["tokens_per_s"] == pytest.approx(16 * 2 / row["step_s"]["median"], rel=1e-3)
        assert row["step_s"]["p10"] <= row["step_s"]["median"] <= row["step_s"]["p90"]


def test_everybody_starts_from_equal_bits_and_trains_the_same_model(done):
    rows = list(done[1].values())
    for row in rows:
        assert row["weights_digest"] == rows[0]["weights_digest"]
        assert row["trained_parameters"] == rows[0]["trained_parameters"] < row["parameters"]
        # fp32: the same sums in another order
        assert row["first_loss"] == pytest.approx(rows[0]["first_loss"], rel=1e-5)
        assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-4)
        assert row["loss"] != row["first_loss"]


def test_the_table_shows_every_contestant(done):
    output, rows = done
    assert "NOT COMPARABLE" not in output
    for name in rows:
        assert any(line.startswith(name + " ") for line in output.splitlines())


def test_a_contestant_that_fails_is_a_row_and_the_others_go_on(run_bench, tmp_path):
    script, out = tmp_path / "with_failures.py", tmp_path / "rows.json"
    script.write_text(WITH_FAILURES)
    names = ["--contestants", "dies,raises,ours", "--rounds", "1"]
    finished = run_bench(script, *SMALL, *names, "--out", str(out))
    assert finished.returncode == 0, finished.stdout
    rows = json.loads(out.read_text())
    assert [row["contestant"] for row in rows] == ["dies", "raises", "ours"]
    assert [row["error"] for row in rows] == ["ended by SIGKILL", "MemoryError: no room for this one", None]
    for row in rows:
        assert row.keys() >= REQUIRED.keys()
    assert [row["tokens_per_s"] is None for row in rows] == [True, True, False]
    assert "MemoryError: no room for this one" in finished.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--contestants", "ours,theirs"], "there is no theirs; there are ours, hf"),
        (["--seq", "1"], "--seq: 1 is below 2"),
    ],
)
def test_a_wrong_argument_is_told(run_bench, arguments, complaint):
    finished = run_bench("throughput.py", *arguments)
    assert finished.returncode == 2
    assert complaint in finished.stdout
