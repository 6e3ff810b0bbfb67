"""bench/kernels.py by the clock: its code path on a CPU, and what it does with calls that a GPU cannot capture."""

from __future__ import annotations

import contextlib
import importlib
import json
from types import SimpleNamespace

import pytest
import torch

OPS = [
    "rms_norm forward",
    "add_rms_norm forward",
    "rms_norm backward frozen",
    "add_rms_norm backward frozen",
    "rms_norm backward trained",
    "add_rms_norm backward trained",
    "swiglu forward",
    "swiglu backward frozen",
    "swiglu backward trained",
    "rotary forward",
    "rotary backward",
    "linear_cross_entropy frozen",
    "linear_cross_entropy trained",
    "linear_kl",
    "attention forward full",
    "attention backward full",
    "attention forward ragged",
    "attention backward ragged",
]
KEYS = {
    "op",
    "model",
    "contestant",
    "status",
    "graph",
    "median_us",
    "p10_us",
    "p90_us",
    "share",
    "share_of",
    "max_error",
}


@pytest.fixture(scope="module")
def done(run_bench, tmp_path_factory):
    """A trial of every op on a CPU: what was printed, the JSON, the folder."""
    folder = tmp_path_factory.mktemp("results")
    finished = run_bench("kernels.py", "--device", "cpu", "--rounds", "2", "--out", str(folder / "kernels.json"))
    assert finished.returncode == 0, finished.stdout
    return finished.stdout, json.loads((folder / "kernels.json").read_text()), folder


@pytest.fixture
def timing(monkeypatch, request):
    monkeypatch.syspath_prepend(str(request.config.rootpath / "bench"))
    return importlib.import_module("kernel_bench.timing")


def by_name(result):
    return {(row["op"], row["contestant"]): row for row in result["rows"]}


def test_the_result_says_where_it_comes_from(done):
    _, result, _ = done
    assert result["device"].startswith("cpu")
    assert result["command"].startswith("python bench/kernels.py --device cpu")
    assert (result["model"], result["tokens"], result["rounds"]) == ("tiny", 256, 2)
    assert result.keys() >= {"commit", "versions", "dtype"}
    assert result["copy_GBps"] > 0
    assert result["product_TFLOPs"] > 0


def test_every_op_has_ours_and_eager_and_they_agree(done):
    _, result, _ = done
    rows = by_name(result)
    assert list(dict.fromkeys(op for op, _ in rows)) == OPS
    for op in OPS:
        for name in ("ours", "eager"):
            row = rows[op, name]
            assert row["status"] == "ok"
            assert row["graph"] is False
            assert 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"]
            assert row["share"] > 0
        assert rows[op, "ours"]["max_error"] is None
        assert rows[op, "eager"]["max_error"] < 1e-5  # fp32: the same sums in another order


def test_a_row_has_its_work_and_its_rate(done):
    _, result, _ = done
    for row in result["rows"]:
        assert row.keys() >= KEYS
        work, rate, unit = ("bytes", "GBps", 1e9) if "bytes" in row else ("flops", "TFLOPs", 1e12)
        assert row[work] > 0
        if row["status"] == "ok":
            assert row[rate] == pytest.approx(row[work] / (row["median_us"] * 1e-6) / unit, rel=1e-3)
        else:
            assert row[rate] is row["share"] is row["median_us"] is None
            assert row["status"].startswith("missing: ")


def test_ideal_work_counted_by_hand(done):
    rows = by_name(done[1])
    T, H, V, N, K, D = 256, 64, 384, 4, 2, 16
    # dy, x, dresidual and dx [T, H], rstd [T] and weight [H]; all fp32 on a CPU
    assert rows["add_rms_norm backward frozen", "ours"]["bytes"] == 4 * (4 * T * H + T + H)
    assert rows["add_rms_norm backward trained", "ours"]["bytes"] == 4 * (4 * T * H + T + 2 * H)
    # only ours brings dv along; tables of 64 positions, D/2 cos and sin each; int64 positions
    tables = 4 * 2 * 64 * D // 2 + 8 * T
    assert rows["rotary backward", "ours"]["bytes"] == 4 * 2 * T * (N + 2 * K) * D + tables
    assert rows["rotary backward", "eager"]["bytes"] == 4 * 2 * T * (N + K) * D + tables
    assert rows["linear_cross_entropy trained", "ours"]["flops"] == 3 * 2 * T * H * V
    # four documents of 64; query i sees i + 1 keys; scores and their product with v
    pairs = 4 * sum(range(1, 65))
    assert rows["attention forward full", "ours"]["flops"] == 2 * 2 * N * D * pairs
    assert rows["attention backward full", "ours"]["flops"] == 5 * 2 * N * D * pairs


def test_what_is_not_there_is_a_row(done):
    _, result, _ = done
    rows = by_name(result)
    assert rows["attention forward full", "backend flash"]["status"].startswith("missing: ")
    for op in OPS[:9]:
        assert (op, "liger") in rows
    assert (OPS[0], "torch.compile") not in rows  # by default on a GPU only


def test_targets_are_judged_and_the_missed_ones_named(done):
    output, result, _ = done
    for target in result["targets"]:
        assert target.keys() == {"model", "op", "target", "reached", "measured"}
    judged = [target for target in result["targets"] if target["reached"] is not None]
    missed = [target for target in judged if not target["reached"]]
    assert f"targets reached {len(judged) - len(missed)} of {len(judged)}" in output
    named = [line for line in output.splitlines() if line.startswith("missed: ")]
    assert [line.split(", ")[0] for line in named] == [f"missed: {target['op']}" for target in missed]


def test_the_picture_is_drawn_again_from_the_json(done, run_bench, tmp_path):
    _, _, folder = done
    signature = b"\x89PNG\r\n"
    assert (folder / "kernels.png").read_bytes().startswith(signature)
    picture = tmp_path / "again.png"
    finished = run_bench("kernels.py", "--from", str(folder / "kernels.json"), "--picture", str(picture))
    assert finished.returncode == 0, finished.stdout
    assert "targets reached" in finished.stdout
    assert picture.read_bytes().startswith(signature)
    assert picture.stat().st_size > 20_000


def test_without_a_gpu_one_line_says_so(run_bench):
    finished = run_bench("kernels.py", CUDA_VISIBLE_DEVICES="")
    assert finished.returncode == 2
    assert finished.stdout == "kernels are timed on a GPU, and PyTorch finds none; --device cpu tries the bench\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--device", "cpu", "--ops", "rotary,softmax"], "--ops: no op has 'softmax' in its name; there are rms_norm"),
        (["--device", "cpu", "--model", "gpt-2"], "--model: there is no gpt-2; there are llama-2-7b"),
        (["--tokens", "5001"], "--tokens: 5001 is below 64 or no multiple of 1250"),
        (["--speed", "high"], "unrecognized arguments: --speed high"),
        (["--compile-only", "--rounds", "3"], "--compile-only takes only --out"),
    ],
)
def test_a_wrong_argument_is_told(run_bench, arguments, complaint):
    finished = run_bench("kernels.py", *arguments)
    assert finished.returncode == 2
    assert complaint in finished.stdout


# One op, with contestants made for the test


def small_op(contestants, timing):
    return timing.Op(
        name="swiglu forward",
        inputs=lambda: {"x": torch.ones(4)},
        contestants=contestants,
        unit="bytes",
        work=32,
        count="x read and written",
        yardstick="copy",
    )


def test_who_fails_or_is_wrong_is_a_row_and_the_others_go_on(timing):
    def doubled(inputs):
        return timing.Run(call=lambda: inputs["x"] * 2, result=lambda out: (out,))

    def dies(inputs):
        raise MemoryError("no room for this one\nand more")

    def absent(inputs):
        importlib.import_module("there_is_no_such_package")

    def wrong(factor):
        return lambda inputs: timing.Run(call=lambda: inputs["x"] * factor, result=lambda out: (out,))

    contestants = {"ours": doubled, "dies": dies, "absent": absent, "wrong": wrong(3), "nan": wrong(float("nan"))}
    op = small_op(contestants | {"same": doubled}, timing)
    entries = {name: timing.Entry() for name in op.contestants}
    timing.race(op, entries, timing.CpuClock(), rounds=2)
    rows = {row["contestant"]: row for row in timing.make_rows(op, "tiny", entries, copy_rate=1.0)}
    assert {name: row["status"] for name, row in rows.items()} == {
        "ours": "ok",
        "dies": "failed: MemoryError: no room for this one",
        "absent": "missing: No module named 'there_is_no_such_package'",
        "wrong": "wrong: differs from ours by 0.5",
        "nan": "wrong: differs from ours by nan",
        "same": "ok",
    }
    assert rows["same"]["samples"] == 2
    assert rows["wrong"]["median_us"] is None


def test_what_a_call_writes_over_is_restored_before_every_sample(timing):
    seen = []

    def in_place(inputs):
        x = inputs["x"].clone()

        def call():
            seen.append(x.sum().item())
            return (x.mul_(2),)

        return timing.Run(call=call, overwrites=(x,))

    op = small_op({"ours": in_place}, timing)
    timing.race(op, entries := {"ours": timing.Entry()}, timing.CpuClock(), rounds=3)
    assert entries["ours"].status == "ok"
    assert seen == [4.0] * len(seen)
    assert len(seen) == 1 + 2 * (1 + 3)  # the check; then two sets, in an untimed sample and three timed ones


class Capture:
    """In place of CUDA: records what is captured, and breaks if a call waits or cannot be captured."""

    def __init__(self, monkeypatch, timing):
        self.waits_are_errors = self.capturing = False
        self.pools = 0
        cuda = SimpleNamespace(
            get_device_properties=lambda device: SimpleNamespace(L2_cache_size=100),
            Stream=object,
            graph_pool_handle=self.new_pool,
            set_sync_debug_mode=self.set_sync_debug_mode,
            CUDAGraph=lambda: SimpleNamespace(replay="replay"),
            graph=self.graph,
        )
        monkeypatch.setattr(timing.torch, "cuda", cuda)

    def new_pool(self):
        self.pools += 1
        return self.pools

    def set_sync_debug_mode(self, mode):
        self.waits_are_errors = mode == "error"

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        self.capturing = True
        try:
            yield
        except Exception:
            # As PyTorch does: the end of a broken capture fails too.
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904
        finally:
            self.capturing = False


@pytest.fixture
def capture(monkeypatch, timing):
    return Capture(monkeypatch, timing)


def test_calls_become_a_graph(capture, timing):
    calls = []
    clock = timing.CudaClock()
    run, reason = clock.replay(
        [lambda: calls.append((0, capture.capturing)), lambda: calls.append((1, capture.capturing))]
    )
    assert (run, reason) == ("replay", None)
    assert calls == [(0, False), (0, True), (1, True)]
    assert clock.pool == capture.pools == 1
    assert not capture.waits_are_errors


def test_a_call_that_waits_for_the_device_is_not_captured(capture, timing):
    calls = []

    def waits():
        if capture.waits_are_errors:
            raise RuntimeError("called a synchronizing CUDA operation")
        assert not capture.capturing
        calls.append("run")

    run, reason = timing.CudaClock().replay([waits, waits])
    assert reason == "RuntimeError: called a synchronizing CUDA operation"
    assert not capture.waits_are_errors
    run()
    assert calls == ["run", "run"]


def test_a_capture_that_breaks_names_the_cause_and_leaves_its_pool(capture, timing):
    def unfit():
        if capture.capturing:
            raise ValueError("not while capturing")

    clock = timing.CudaClock()
    run, reason = clock.replay([unfit])
    assert reason == "ValueError: not while capturing"
    run()
    assert clock.pool == capture.pools == 2
