"""bench/step_profile.py: its sums are of what was profiled, and a step's products are those of the cost model."""

from __future__ import annotations

import gzip
import json

import pytest
import step_profile
from workload import Workload

from llama_pro_fast.planning.cost import step_cost


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    out, trace = folder / "profile.json", folder / "trace.json.gz"
    arguments = ["--device", "cpu", "--seq", "32", "--micro-batch", "1", "--steps", "2", "--warmup", "1"]
    assert step_profile.main([*arguments, "--out", str(out), "--trace", str(trace)]) == 0
    return json.loads(out.read_text()), json.loads(gzip.decompress(trace.read_bytes()))


def test_kernels_and_kinds_tell_of_the_same_time(written):
    result, _ = written
    total = sum(row["ms"] for row in result["kernels"])
    assert sum(row["ms"] for row in result["kinds"]) == pytest.approx(total)
    assert sum(row["share"] for row in result["kinds"]) == pytest.approx(1)
    assert sum(row["calls"] for row in result["kernels"]) == pytest.approx(result["launches"])
    assert total > 0
    for rows in (result["kernels"], result["kinds"]):
        assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)


def test_products_are_counted_as_they_are_made(written):
    result, _ = written
    workload = Workload(size="tiny", seq=32, micro_batch=1, steps=1, warmup=0, device="cpu")
    cost = step_cost(workload.config, workload.trained_blocks, seq_len=32)
    row = next(row for row in result["kinds"] if row["kind"] == "products")
    assert row["tflops"] * row["ms"] * 1e9 == pytest.approx(32 * (cost.total - cost.attention))
    # 10 blocks of four products forward, dX from the lowest trained block (4) up but its q/k/v, dW of two, the head.
    products = {name: n for name, n in ((r["kernel"], r["calls"]) for r in result["kernels"]) if name == "aten::mm"}
    assert products == {"aten::mm": 10 * 4 + (6 * 4 - 1) + 2 * 4 + 2}


def test_the_trace_holds_the_steps(written):
    _, trace = written
    assert sum(event.get("name") == step_profile.STEP for event in trace["traceEvents"]) >= 2


@pytest.mark.parametrize(
    ("intervals", "length"),
    [([(0, 1), (1, 3)], 3), ([(0, 4), (1, 2)], 4), ([(5, 6), (0, 1)], 2), ([(0, 2), (1, 3), (7, 8)], 4)],
)
def test_busy_is_the_length_of_the_union(intervals, length):
    assert step_profile.busy(intervals) == length


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNN", "products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>", "attention"),
        ("kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90", "attention"),
        ("_rms_norm_backward_kernel", "norms"),
        ("_dscale_kernel", "norms"),
        ("_cross_entropy_kernel", "loss"),
        ("Memcpy DtoD (Device -> Device)", "copies and fills"),
        ("multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>", "optimizer"),
        ("vectorized_elementwise_kernel<8, CUDAFunctor_add>", step_profile.REST),
    ],
)
def test_a_kernel_is_known_by_its_name(name, kind):
    assert step_profile.kind_of(name) == kind
