"""bench/throughput.py: equal weights, equal losses, whole rows, and one contestant's end is not the others'."""

from __future__ import annotations

import copy
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import throughput
import throughput_rows
from contestants import CONTESTANTS

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
SMALL = ["--device", "cpu", "--seq", "16", "--micro-batch", "2", "--steps", "2", "--warmup", "1"]
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
for build in (raises, fills, dies):
    contestants.CONTESTANTS[{raises: "raises", fills: "fills"}.get(build, "dies")] = contestants.Contestant(build)
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


def test_every_contestant_is_a_row_and_every_row_is_whole(done):
    rows = done[1]
    assert list(rows) == list(CONTESTANTS)
    throughput_rows.validate(list(rows.values()))
    for name, row in rows.items():
        assert row["status"] == ("measured" if name in ABLE else "missing")
        assert row["error"] == CONTESTANTS[name].missing("cpu")
        assert row["versions"].keys() >= {"torch", "transformers", "triton", "python", "cuda", "driver", "peft"}
        assert row["command"].startswith("python bench/throughput.py --device cpu --seq 16")
        assert (row["seq"], row["micro_batch"], row["steps"], row["warmup"]) == (16, 2, 2, 1)
    assert {"ours", "ours-block", "hf", "hf-checkpointing", "hf-checkpointing-trained", "full"} <= set(ABLE)
    assert rows["hf-bf16"]["error"] == rows["hf-compile"]["error"] == "needs a GPU"
    assert ("lora" in ABLE) is (find_spec("peft") is not None)


@pytest.mark.parametrize("file", sorted(RESULTS.glob("throughput-*.json")), ids=lambda file: file.stem)
def test_a_stored_result_is_whole(file):
    throughput_rows.validate(json.loads(file.read_text()))


def test_a_row_that_is_not_whole_is_told(done):
    row = done[1]["ours"]
    for key, wrong in [("loss", None), ("seq", 16.0), ("status", "fine"), ("error", "none"), ("date", 2026)]:
        with pytest.raises(ValueError, match=f"ours: {key}"):
            throughput_rows.validate([copy.copy(row) | {key: wrong}])
    without = {key: value for key, value in row.items() if key != "peak_gib"}
    with pytest.raises(ValueError, match="peak_gib is 'not there', not a float"):
        throughput_rows.validate([without])
    with pytest.raises(ValueError, match="hf-bf16: tokens_per_s"):
        throughput_rows.validate([done[1]["hf-bf16"] | {"tokens_per_s": 1.0}])


def test_the_speed_is_that_of_the_median_step(done):
    for name in ABLE:
        row = done[1][name]
        assert row["rounds"] == len(row["round_tokens_per_s"]) == 2
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
    rows = done[1]
    for name in ABLE:
        row = rows[name]
        assert (row["trained_parameters"] == row["parameters"]) is (row["trains"] == "everything")
    assert rows["full"]["parameters"] < rows["ours"]["parameters"]
    # Of the base: two products a weight forward and backward to the input, and two for the weight's gradient.
    weights = rows["full"]["parameters"] - 4096 * 256 - 17 * 256
    attention = 3 * 8 * 4 * 256 * 16 / 2
    assert rows["full"]["gflop_per_token"] == pytest.approx((6 * weights + attention) / 1e9, rel=1e-9)


def test_on_a_cpu_bytes_kept_and_products_are_counted_of_those_who_train_the_new_blocks(done):
    rows = done[1]
    for name in ABLE:
        assert (rows[name]["products_flop"] is not None) is (rows[name]["trains"] == "new blocks")
    ours, hf = rows["ours"], rows["hf"]
    H, I, N, K, D = 256, 688, 8, 4, 32
    kept = 2 * (2 * H + 4) + 4 * (N + K) * D + 4 * N + 4 * I
    assert ours["kept_bytes_per_token"] == {"prefix": 0, "lowest trained": kept, "frozen": kept, "trained": kept}
    for name in ("frozen", "trained"):
        assert kept < 0.8 * hf["kept_bytes_per_token"][name]
    attention = (10 + 2 * 6) * 4 * H * 16 / 2
    assert ours["products_flop"] == 32 * (round(ours["gflop_per_token"] * 1e9) - attention)
    assert ours["products_flop"] < hf["products_flop"] < rows["hf-checkpointing"]["products_flop"]
    assert f"{kept:,} of {hf['kept_bytes_per_token']['frozen']:,.0f} in a frozen block" in done[0]


def test_the_table_shows_every_contestant_and_says_who_is_missing(done):
    lines = done[0].splitlines()
    assert not any("NOT COMPARABLE" in line for line in lines)
    for name in ABLE:
        assert any(line.startswith(name + " ") for line in lines)
    assert any("hf-compile" in line and line.endswith("missing: needs a GPU") for line in lines)


def test_what_is_not_comparable_is_said(done):
    rows = [copy.copy(done[1][name]) for name in ("ours", "hf", "full")]
    assert throughput_rows.incomparable(rows) == []
    rows[1]["weights_digest"] = rows[2]["weights_digest"]
    rows[2]["first_loss"] *= 1.00002
    said = throughput_rows.incomparable(rows)
    assert said[0] == "NOT COMPARABLE: contestants started from different weights"
    assert said[1].startswith("NOT COMPARABLE: the first loss of full is")
    assert len(said) == 2
    rows[2]["compute_dtype"] = "bfloat16"
    assert len(throughput_rows.incomparable(rows)) == 1


def test_a_contestant_that_fails_is_a_row_and_the_others_go_on(run_bench, tmp_path):
    script, out = tmp_path / "with_failures.py", tmp_path / "rows.json"
    script.write_text(WITH_FAILURES)
    names = ["--contestants", "dies,raises,fills,ours", "--rounds", "2"]
    finished = run_bench(script, *SMALL, *names, "--out", str(out))
    assert finished.returncode == 0, finished.stdout
    rows = json.loads(out.read_text())
    throughput_rows.validate(rows)
    assert [(row["contestant"], row["status"], row["error"], row["rounds"]) for row in rows] == [
        ("dies", "failed", "ended by SIGKILL", 1),
        ("raises", "failed", "MemoryError: no room for this one", 1),
        ("fills", "out of memory", "OutOfMemoryError: CUDA out of memory.", 1),
        ("ours", "measured", None, 2),
    ]
    assert "raises: failed: MemoryError: no room for this one" in finished.stdout


def test_without_time_all_are_missing(tmp_path):
    out = tmp_path / "rows.json"
    assert throughput.main([*SMALL, "--budget", "0", "--out", str(out)]) == 0
    rows = {row["contestant"]: row for row in json.loads(out.read_text())}
    throughput_rows.validate(list(rows.values()))
    assert rows["ours"]["error"] == "not run: the time budget was used up"
    assert rows["hf-bf16"]["error"] == "needs a GPU"
    assert {row["status"] for row in rows.values()} == {"missing"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--contestants", "ours,theirs"], "there is no theirs; there are ours, hf-liger,"),
        (["--seq", "1"], "--seq: 1 is below 2"),
        (["--seq", "16", "--document", "5"], "--document: 5 does not divide a sequence of 16 tokens"),
    ],
)
def test_a_wrong_argument_is_told(capsys, arguments, complaint):
    with pytest.raises(SystemExit, match="2"):
        throughput.main(arguments)
    assert complaint in capsys.readouterr().err
