"""bench/ops.py: the work it rates by, that it refuses wrong results, and that its check of machine code can fail."""

from __future__ import annotations

import json

import ops
import pytest
import torch
from kernel_bench.op import Op


@pytest.fixture(scope="module")
def rows(run_bench, tmp_path_factory):
    """A trial of every op on a CPU."""
    out = tmp_path_factory.mktemp("results") / "kernels.json"
    finished = run_bench("ops.py", "--device", "cpu", "--out", str(out))
    assert finished.returncode == 0, finished.stdout
    result = json.loads(out.read_text())
    assert {"device", "commit", "versions", "command", "copy_GBps", "product_TFLOPs"} <= result.keys()
    return {(row["op"], row["contestant"]): row for row in result["rows"]}


def test_eager_pytorch_agrees_with_ours_in_every_op(rows):
    in_codes = {op for op, _ in rows if "e4m3" in op}
    assert all(row["status"] == "ok" for (op, _), row in rows.items() if op in in_codes)
    assert len(in_codes) == 5
    for op in {op for op, _ in rows} - in_codes:
        row = rows[op, "eager"]
        assert row["status"] == rows[op, "ours"]["status"] == "ok"
        assert row["max_error"] < 1e-5  # fp32: the same sums in another order
        assert row["median_us"] > 0
    assert rows["swiglu forward", "liger"]["status"].startswith(("missing: ", "failed: "))


def test_ideal_work_counted_by_hand(rows):
    """Each input once, each output once, 4 bytes a number on a CPU; FLOPs of products."""
    T, H, I, V, N, K, D = 256, 64, 160, 384, 4, 2, 16
    tables = 4 * 2 * 64 * D // 2 + 8 * T  # of 64 positions, D/2 cos and sin each; int64 positions
    work = {
        "rms_norm forward": 4 * (2 * T * H + T + H),  # x, y; rstd, weight
        "add_rms_norm forward": 4 * (4 * T * H + T + H),  # x, residual, y, sum
        "rms_norm backward frozen": 4 * (3 * T * H + T + H),  # dy, x, dx
        "rms_norm backward trained": 4 * (3 * T * H + T + 2 * H),  # dweight too
        "add_rms_norm backward frozen": 4 * (4 * T * H + T + H),  # dresidual too
        "add_rms_norm backward trained": 4 * (4 * T * H + T + 2 * H),
        "linear_dscale qkv": 4 * (2 * (N + 2 * K) * D * H + 2 * H),  # weight, dweight; scale, dscale
        "linear_dscale gate_up": 4 * (2 * 2 * I * H + 2 * H),
        "swiglu forward": 4 * 3 * T * I,  # gate, up, product
        "swiglu backward frozen": 4 * 5 * T * I,  # dy, gate, up, dgate, dup
        "swiglu backward trained": 4 * 6 * T * I,  # the product too
        "rotary forward": 4 * 2 * T * (N + K) * D + tables,
        "rotary forward in place": 4 * 2 * T * (N + K) * D + tables,
        "rotary backward": 4 * 2 * T * (N + 2 * K) * D + tables,
        "qk_norm_rotary forward": 4 * (2 * T * (N + K) * D + 2 * D) + tables,
        "qk_norm_rotary backward frozen": 4 * (3 * T * (N + K) * D + 2 * T * K * D + 2 * D) + tables,  # dv; weights
        "qk_norm_rotary backward trained": 4 * (3 * T * (N + K) * D + 2 * T * K * D + 4 * D)
        + tables,  # their gradients
        "quantize_e4m3": 4 * T * H + T * (H + 4),  # a byte a code, a scale a token
        "rms_norm_backward e4m3": 4 * (3 * T * H + T + H) + T * (H + 4),
        "swiglu_backward e4m3": 4 * 3 * T * I + T * (2 * I + 4),
        "rotary_backward e4m3": 4 * T * (N + 2 * K) * D + tables + T * ((N + 2 * K) * D + 4),
        "qk_norm_rotary_backward e4m3": 4 * (T * (N + 2 * K) * D + T * (N + K) * D + 2 * D)
        + tables
        + T * ((N + 2 * K) * D + 4),
        "cross_entropy": 4 * (2 * T * V + T) + 8 * T,  # logits, their gradient, losses; labels
        "cross_entropy_kl": 4 * (3 * T * V + 2 * T) + 8 * T,  # the base's logits too, and the divergence
        "cross_entropy evaluation": 4 * (T * V + T) + 8 * T + T,  # and who was right
        "kl_divergence": 4 * (2 * T * V + T),
        "adamw": (4 * 7 + 2) * 2 * I * H,  # gradient; weight and moments there and back; the bf16 copy
        "linear_cross_entropy frozen": 2 * 2 * T * H * V,
        "linear_cross_entropy trained": 3 * 2 * T * H * V,
        "linear_kl": 2 * 2 * T * H * V,
    }
    found = {op: row.get("bytes", row.get("flops")) for (op, name), row in rows.items() if name == "ours"}
    assert found == work
    assert rows["rotary backward", "eager"]["bytes"] == 4 * 2 * T * (N + K) * D + tables  # only ours brings dv along


def test_who_fails_or_is_wrong_is_a_row_and_the_others_go_on():
    def times(factor):
        return lambda x: lambda: x * factor

    def absent(x):
        raise ImportError("No module named 'absent'")

    def dies(x):
        raise MemoryError("no room for this one\nand more")

    contestants = {"ours": times(2), "dies": dies, "absent": absent, "wrong": times(3), "nan": times(float("nan"))}
    op = Op(name="x", inputs=lambda: [torch.ones(4)], contestants=contestants | {"same": times(2)}, work=32)
    rows = {row["contestant"]: row for row in ops.time_op(op, "tiny", "cpu", (1.0, 1.0))}
    assert {name: row["status"] for name, row in rows.items()} == {
        "ours": "ok",
        "dies": "failed: no room for this one",
        "absent": "missing: No module named 'absent'",
        "wrong": "wrong: differs from ours by 0.5",
        "nan": "wrong: differs from ours by nan",
        "same": "ok",
    }
    assert rows["wrong"]["median_us"] is None
    assert rows["same"]["GBps"] == pytest.approx(32 / rows["same"]["median_us"] / 1e3, rel=1e-3)


# The machine code. A process of its own, because the compiler's target is set for all of it.
PROGRAM = """
import json
import torch, triton, triton.language as tl
import ops as bench
from kernel_bench.op import Op
from llama_pro_kernels import triton_kernels as kernels
from llama_pro_kernels.triton_kernels.launch import launch


@triton.jit
def _hoarding_kernel(x_ptr, y_ptr, N: tl.constexpr):
    # 256 numbers a thread, all of them wanted at the end.
    offsets = tl.arange(0, N)
    x = tl.load(x_ptr + offsets)
    tl.store(y_ptr + offsets, tl.exp(x) * tl.sum(x, axis=0) + x)


def hoard(x, y):
    launch(_hoarding_kernel, (1,), x, y, N=8192, num_warps=1)


def rows(width, offset=0, dtype=torch.bfloat16):
    return torch.empty(4096, width + offset, dtype=dtype, device="meta")[:, offset:]


def op(name, function, *inputs):
    return Op(name=name, inputs=lambda: inputs, contestants={"ours": lambda *x: lambda: function(*x)}, work=1)


weight = torch.empty(4095, dtype=torch.bfloat16, device="meta")
CASES = [
    op("good", kernels.swiglu_forward, rows(2048)),
    op("odd stride", kernels.swiglu_forward, rows(2048, offset=1)),
    op("odd width", kernels.rms_norm_forward, rows(4095), weight, 1e-5),
    op("8-byte stride", kernels.swiglu_forward, rows(2048, offset=4)),
    op("spills", hoard, rows(8192, dtype=torch.float32), rows(8192, dtype=torch.float32)),
]
bench.elementwise_ops = lambda setting, kernels: CASES
found = bench.compile_model("llama-2-7b")
codes = []
for name in ("good", "odd width"):
    bench.compile_all = lambda name=name: [row for row in found if row["case"] == name]
    codes.append(bench.compile_only(None))
print(json.dumps({"rows": {row["case"] + " " + row["target"]: row for row in found}, "codes": codes}))
"""


@pytest.fixture(scope="module")
def found(run_bench, tmp_path_factory):
    pytest.importorskip("triton")
    program = tmp_path_factory.mktemp("program") / "broken.py"
    program.write_text(PROGRAM)
    done = run_bench(program)
    assert done.returncode == 0, done.stdout
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_a_narrow_stream_fails_on_every_target_and_a_spill_on_hopper(found, target):
    rows = found[1]["rows"]
    good, spilling = rows[f"good {target}"], rows[f"spills {target}"]
    assert good["streams"] == ["gate_up_ptr", "y_ptr"]
    assert (good["failed"], good["narrow_streams"], good["stack"], good["spills"]) == (False, [], 0, 0)
    assert set(good["accesses"]["gate_up_ptr"]) == {"128"}
    for case in ("odd stride", "odd width", "8-byte stride"):
        assert rows[f"{case} {target}"]["failed"]
        assert rows[f"{case} {target}"]["narrow_streams"]
    assert spilling["spills"] > 0
    assert spilling["stack"] > 0
    assert spilling["failed"] == (target == "sm_90")


def test_the_exit_code_tells(found):
    screen, result = found
    assert result["codes"] == [0, 1]
    assert "FAILED: llama-2-7b, odd width" in screen
    assert "rows 3, rows with spills or stack 0, narrow streams 0" in screen
