"""bench/step_profile.py: its sums are of what was profiled, and a step's products are those of the cost model."""

from __future__ import annotations

import gzip
import json

import pytest
import step_profile
from workload import Workload

from llama_pro_fast.cost import step_cost


def test_a_profile(tmp_path):
    out, trace = tmp_path / "profile.json", tmp_path / "trace.json.gz"
    arguments = ["--device", "cpu", "--seq", "32", "--micro-batch", "1", "--out", str(out), "--trace", str(trace)]
    assert step_profile.main(arguments) == 0
    result = json.loads(out.read_text())
    kernels, kinds = ({row[key]: row for row in result[f"{key}s"]} for key in ("kernel", "kind"))
    total = sum(row["ms"] for row in kernels.values())
    assert 0 < total == pytest.approx(sum(row["ms"] for row in kinds.values()))
    assert sum(row["share"] for row in kinds.values()) == pytest.approx(1)
    assert sum(row["calls"] for row in kernels.values()) == pytest.approx(result["launches"])
    workload = Workload(size="tiny", seq=32, micro_batch=1, steps=1, warmup=0, device="cpu")
    cost = step_cost(workload.config, workload.trained_blocks, seq_len=32)
    products = kinds["products"]
    assert products["tflops"] * products["ms"] * 1e9 == pytest.approx(32 * (cost.total - cost.attention))
    # 10 blocks of four products forward, dX from the lowest trained block (4) up but its q/k/v, dW of two, the head.
    assert kernels["aten::mm"]["calls"] == 10 * 4 + (6 * 4 - 1) + 2 * 4 + 2
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == step_profile.STEP for event in events) >= 2


def test_busy_is_the_length_of_the_union():
    assert step_profile.busy([(0, 4), (1, 2)]) == 4
    assert step_profile.busy([(0, 2), (1, 3), (7, 8)]) == 4


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNN", "products"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, cutlass::bfloat16_t>>", "attention"),
        ("kernel_cutlass_kernel_flash_attncuteflash_bwd_sm90FlashAttentionBackwardSm90", "attention"),
        ("_dscale_kernel", "norms"),
        ("Memcpy DtoD (Device -> Device)", "copies and fills"),
        ("multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4>>", "optimizer"),
        ("vectorized_elementwise_kernel<8, CUDAFunctor_add>", step_profile.REST),
    ],
)
def test_a_kernel_is_known_by_its_name(name, kind):
    assert step_profile.kind_of(name) == kind
