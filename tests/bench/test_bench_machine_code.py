"""The check of the kernels' machine code can fail: each thing it looks for is put there once, and it is found."""

import json

import pytest

pytest.importorskip("triton")

# A process of its own, because the compiler's target is set for all of it.
PROGRAM = """
import json
import torch, triton, triton.language as tl
import ops as bench_ops
from kernel_bench.machine_code import compile_for, disassemble
from kernel_bench.shapes import MODELS, Case, ModelShape
from llama_pro_kernels import triton_kernels as ops
from llama_pro_kernels.triton_kernels.launch import launch

T, bf16 = bench_ops.TOKENS, torch.bfloat16


@triton.jit
def _hoarding_kernel(x_ptr, y_ptr, N: tl.constexpr):
    # 256 numbers a thread, all of them wanted at the end.
    offsets = tl.arange(0, N)
    x = tl.load(x_ptr + offsets)
    total = tl.sum(x, axis=0)
    tl.store(y_ptr + offsets, tl.exp(x) * total + x)


def hoard():
    launch(_hoarding_kernel, (1,), torch.empty(T, 8192), torch.empty(T, 8192), N=8192, num_warps=1)


def rows(width, offset=0):
    return torch.empty(T, width + offset, dtype=bf16)[:, offset:]


CASES = {
    "good": lambda: ops.swiglu_forward(rows(2048)),
    "odd stride": lambda: ops.swiglu_forward(rows(2048, offset=1)),
    "odd width": lambda: ops.rms_norm_forward(rows(4095), torch.empty(4095, dtype=bf16), 1e-5),
    "8-byte stride": lambda: ops.swiglu_forward(rows(2048, offset=4)),
    "spills": hoard,
}
found = {}
bench_ops.cases = lambda shape, tokens: [Case(name=name, run=run) for name, run in CASES.items()]
for row in bench_ops.compile_model("llama-2-7b"):
    found[row["case"] + " " + row["target"]] = row

bench_ops.cases = lambda shape, tokens: [Case(name="good", run=CASES["good"])]
bench_ops.compile_all = lambda: bench_ops.compile_model("llama-2-7b")
good = bench_ops.compile_only(None)
bench_ops.cases = lambda shape, tokens: [Case(name="bad", run=CASES["odd width"])]
bad = bench_ops.compile_only(None)
print(json.dumps({"rows": found, "good": good, "bad": bad}))
"""


@pytest.fixture(scope="module")
def found(run_bench, tmp_path_factory):
    program = tmp_path_factory.mktemp("program") / "broken.py"
    program.write_text(PROGRAM)
    done = run_bench(program)
    assert done.returncode == 0, done.stdout
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_good_code_passes(found, target):
    row = found[1]["rows"][f"good {target}"]
    assert row["streams"] == ["gate_up_ptr", "y_ptr"]
    assert (row["failed"], row["narrow_streams"], row["stack"], row["spills"]) == (False, [], 0, 0)
    assert set(row["accesses"]["gate_up_ptr"]) == {"128"}


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("case", ["odd stride", "odd width", "8-byte stride"])
def test_a_narrow_stream_fails_on_every_target(found, case, target):
    row = found[1]["rows"][f"{case} {target}"]
    assert row["failed"]
    assert row["narrow_streams"]


def test_a_spill_fails_on_hopper_and_is_listed_elsewhere(found):
    for target in ("sm_80", "sm_90", "sm_100"):
        row = found[1]["rows"][f"spills {target}"]
        assert row["spills"] > 0
        assert row["stack"] > 0
        assert row["failed"] == (target == "sm_90")


def test_the_exit_code_tells(found):
    screen, result = found
    assert (result["good"], result["bad"]) == (0, 1)
    assert "FAILED: llama-2-7b, bad" in screen
    assert "rows 3, rows with spills or stack 0, narrow streams 0" in screen
