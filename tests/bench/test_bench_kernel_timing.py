"""bench/ops.py by the clock: its code path on a CPU, and what it does with calls that a GPU cannot capture."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import weakref
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
    finished = run_bench("ops.py", "--device", "cpu", "--rounds", "2", "--out", str(folder / "kernels.json"))
    assert finished.returncode == 0, finished.stdout
    return finished.stdout, json.loads((folder / "kernels.json").read_text()), folder


@pytest.fixture
def timing(monkeypatch, request):
    monkeypatch.syspath_prepend(str(request.config.rootpath / "bench"))
    return importlib.import_module("kernel_bench.timing")


@pytest.fixture
def report(timing):
    return timing.report


def by_name(result):
    return {(row["op"], row["contestant"]): row for row in result["rows"]}


def test_the_result_says_where_it_comes_from(done):
    _, result, _ = done
    assert result["device"].startswith("cpu")
    assert result["command"].startswith("python bench/ops.py --device cpu")
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
    """Each input once, each output once, 4 bytes a number on a CPU; FLOPs of products."""
    rows = by_name(done[1])
    T, H, I, V, N, K, D = 256, 64, 160, 384, 4, 2, 16
    tables = 4 * 2 * 64 * D // 2 + 8 * T  # of 64 positions, D/2 cos and sin each; int64 positions
    elementwise = {
        "rms_norm forward": 4 * (2 * T * H + T + H),  # x, y; rstd, weight
        "add_rms_norm forward": 4 * (4 * T * H + T + H),  # x, residual, y, sum
        "rms_norm backward frozen": 4 * (3 * T * H + T + H),  # dy, x, dx
        "rms_norm backward trained": 4 * (3 * T * H + T + 2 * H),  # dweight too
        "add_rms_norm backward frozen": 4 * (4 * T * H + T + H),  # dresidual too
        "add_rms_norm backward trained": 4 * (4 * T * H + T + 2 * H),
        "swiglu forward": 4 * 3 * T * I,  # gate, up, product
        "swiglu backward frozen": 4 * 5 * T * I,  # dy, gate, up, dgate, dup
        "swiglu backward trained": 4 * 6 * T * I,  # the product too
        "rotary forward": 4 * 2 * T * (N + K) * D + tables,
        "rotary backward": 4 * 2 * T * (N + 2 * K) * D + tables,
    }
    # Four documents of 64, or four times five that halve; query i sees i + 1 keys.
    full = 4 * sum(range(1, 65))
    ragged = 4 * sum(length * (length + 1) // 2 for length in (31, 17, 7, 5, 4))
    products = {
        "linear_cross_entropy frozen": 2 * 2 * T * H * V,
        "linear_cross_entropy trained": 3 * 2 * T * H * V,
        "linear_kl": 2 * 2 * T * H * V,
        "attention forward full": 2 * 2 * N * D * full,
        "attention backward full": 5 * 2 * N * D * full,
        "attention forward ragged": 2 * 2 * N * D * ragged,
        "attention backward ragged": 5 * 2 * N * D * ragged,
    }
    assert {op: rows[op, "ours"]["bytes"] for op in elementwise} == elementwise
    assert {op: rows[op, "ours"]["flops"] for op in products} == products
    assert set(OPS) == set(elementwise) | set(products)
    # only ours brings dv along
    assert rows["rotary backward", "eager"]["bytes"] == 4 * 2 * T * (N + K) * D + tables


def test_what_is_not_there_is_a_row(done):
    _, result, _ = done
    rows = by_name(result)
    assert rows["attention forward full", "backend flash"]["status"].startswith("missing: ")
    for op in OPS[:9]:
        assert (op, "liger") in rows
    assert (OPS[0], "torch.compile") not in rows  # by default on a GPU only


def test_a_cpu_judges_no_target(done):
    assert "no target is judged" in done[0]
    assert "missed" not in done[0]


def row(op, contestant, *, share=None, rate=None, status="ok"):
    unit = "bytes" if op.startswith(("rms", "add", "swiglu", "rotary")) else "flops"
    return {
        "model": "m", "op": op, "contestant": contestant, "status": status, "share": share, "share_of": "copy",
        {"bytes": "GBps", "flops": "TFLOPs"}[unit]: rate, "count": "", "max_error": None, "graph": True, "note": "",
        "median_us": 1.0, "p10_us": 1.0, "p90_us": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("op", "threshold"),
    [
        ("add_rms_norm backward frozen", 0.85),
        ("swiglu forward", 0.85),
        ("rotary backward", 0.85),
        ("linear_cross_entropy frozen", 0.90),
        ("attention backward ragged", 0.97),
    ],
)
def test_a_share_is_held_to_its_target(report, op, threshold):
    for share, reached in ((threshold, True), (threshold - 1e-4, False), (None, None)):
        (target,) = report.judge([row(op, "ours", share=share, rate=1.0)])
        assert (target["reached"], target["measured"]) == (reached, share)
    (target,) = report.judge([row(op, "ours", status="failed: x")])
    assert target["reached"] is False


@pytest.mark.parametrize("rival", ["liger", "torch.compile"])
def test_ours_is_to_be_ahead_of_every_rival_by_rate(report, rival):
    def judged(ours, theirs):
        rows = [row("rms_norm forward", "ours", rate=ours), row("rms_norm forward", rival, rate=theirs)]
        (target,) = report.judge(rows)
        return target["reached"]

    assert judged(2.0, 1.0) is True
    assert judged(1.0, 1.0) is False
    assert judged(1.0, 2.0) is False
    assert judged(1.0, None) is None
    assert judged(None, 1.0) is False


def test_missed_targets_are_named(report):
    rows = [row("swiglu forward", "ours", share=0.8, rate=8.0), row("swiglu forward", "liger", share=0.5, rate=5.0)]
    said = report.summary({"device": "NVIDIA H200", "rows": rows, "targets": report.judge(rows)})
    assert "targets reached 1 of 2" in said
    assert said.splitlines()[-1] == "missed: swiglu forward, m: at least 85% of the copy bandwidth: 0.800"


def test_the_picture_is_drawn_again_from_the_json(done, run_bench, tmp_path):
    _, _, folder = done
    signature = b"\x89PNG\r\n"
    assert (folder / "kernels.png").read_bytes().startswith(signature)
    picture = tmp_path / "again.png"
    finished = run_bench("ops.py", "--from", str(folder / "kernels.json"), "--picture", str(picture))
    assert finished.returncode == 0, finished.stdout
    assert "no target is judged" in finished.stdout
    assert picture.read_bytes().startswith(signature)
    assert picture.stat().st_size > 20_000


def test_without_a_gpu_one_line_says_so(run_bench):
    finished = run_bench("ops.py", CUDA_VISIBLE_DEVICES="")
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
    finished = run_bench("ops.py", *arguments)
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


def test_inputs_are_rotated_beyond_the_cache_and_a_replay_is_long(timing):
    op = small_op({}, timing)
    gpu = SimpleNamespace(device=torch.device("cuda"), cache_bytes=100)
    large = dataclasses.replace(op, work=timing.REPLAY_BYTES)
    assert timing.number_of_sets(large, set_bytes=1000, clock=gpu) == 2
    assert timing.number_of_sets(large, set_bytes=30, clock=gpu) == 10
    assert timing.number_of_sets(dataclasses.replace(op, work=timing.REPLAY_BYTES // 8), 1000, gpu) == 8
    assert timing.number_of_sets(dataclasses.replace(op, work=1, unit="flops"), 1000, gpu) == 2


def test_contestants_take_turns_and_each_sample_has_its_lead(timing):
    order = []

    class Recorder(timing.CpuClock):
        def sample(self, lead, run):
            order.append("lead")
            return super().sample(lead, run)

    def contestant(name):
        return lambda inputs: timing.Run(call=lambda: order.append(name) or (inputs["x"],))

    names = ["ours", "b", "c"]
    op = small_op({name: contestant(name) for name in names}, timing)
    timing.race(op, {name: timing.Entry() for name in names}, Recorder(), rounds=3)
    samples = " ".join(order).split("lead")[-9:]
    # In a sample the calls over all sets run twice: untimed, then timed.
    assert [sample.split() for sample in samples] == [
        [name] * 4 for name in ("ours", "b", "c", "b", "c", "ours", "c", "ours", "b")
    ]


class Capture:
    """In place of CUDA: records what is captured, and breaks if a call waits or cannot be captured."""

    def __init__(self, monkeypatch, timing):
        self.waits_are_errors = self.capturing = self.stuck = False
        self.pools = 0
        cuda = SimpleNamespace(
            get_device_properties=lambda device: SimpleNamespace(L2_cache_size=100),
            Stream=object,
            graph_pool_handle=self.new_pool,
            set_sync_debug_mode=self.set_sync_debug_mode,
            CUDAGraph=lambda: SimpleNamespace(replay="replay"),
            graph=self.graph,
            empty_cache=self.empty_cache,
        )
        monkeypatch.setattr(timing.torch, "cuda", cuda)

    def new_pool(self):
        self.pools += 1
        return self.pools

    def set_sync_debug_mode(self, mode):
        self.waits_are_errors = mode == "error"

    @contextlib.contextmanager
    def graph(self, graph, *, pool, stream, capture_error_mode):
        self.empty_cache()
        self.capturing = True
        try:
            yield
        except Exception:
            # As PyTorch does: the end of a broken capture fails too, and its allocator never learns of the end.
            self.stuck = True
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")  # noqa: B904
        finally:
            self.capturing = False

    def empty_cache(self):
        assert not self.stuck, "INTERNAL ASSERT FAILED: captures_underway.empty()"


@pytest.fixture
def capture(monkeypatch, timing):
    return Capture(monkeypatch, timing)


def test_calls_become_a_graph(capture, timing):
    calls, alive = [], []

    class Result:
        pass

    def call(index):
        calls.append((index, capture.capturing))
        if capture.capturing:
            # No call may get the memory of a result before it.
            assert all(reference() is not None for reference in alive)
            result = Result()
            alive.append(weakref.ref(result))
            return result

    clock = timing.CudaClock()
    run, reason = clock.replay([lambda: call(0), lambda: call(1), lambda: call(2)])
    assert (run, reason) == ("replay", None)
    assert calls == [(0, False), (0, True), (1, True), (2, True)]
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


def test_a_capture_that_breaks_names_the_cause_and_ends_capturing(capture, timing):
    def unfit():
        if capture.capturing:
            raise ValueError("not while capturing")

    clock = timing.CudaClock()
    run, reason = clock.replay([unfit])
    assert reason == "ValueError: not while capturing"
    run()
    run, reason = clock.replay([lambda: None])
    assert reason == "a capture before it broke"
    run()
    clock.free_memory()
