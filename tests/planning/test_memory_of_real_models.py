"""What a step holds at the shapes of real models, checked by hand: none of them is computed here."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import transformers

from llama_pro_fast.expansion.plan import ExpansionPlan
from llama_pro_fast.hf.config import find_config
from llama_pro_fast.hf.families import block_spec
from llama_pro_fast.model.policy import BlockClass, Recompute
from llama_pro_fast.model.spec import BlockSpec
from llama_pro_fast.model.trained import Trained
from llama_pro_fast.planning.block_memory import attention_scratch, backward_peak
from llama_pro_fast.planning.job import Job, expanded_shape
from llama_pro_fast.planning.memory import states_bytes, step_memory
from llama_pro_fast.planning.search import policies


def real(model: str, **how) -> Job:
    """With 8 new blocks."""
    _, base = find_config(model)
    plan = ExpansionPlan.from_groups(base.num_hidden_layers, 8)
    return Job(config=expanded_shape(base, plan), trained=plan.trained, **how)


def test_llama_2_7b_and_8_blocks_take_about_99_gb_at_16k_tokens():
    job = real("meta-llama/Llama-2-7b-hf")
    said = step_memory(job, next(policies(job)), micro_batch_size=4, accumulating=True)
    assert 98e9 < said.total < 100e9
    assert said.kept_frozen + said.kept_trained == 36 * 4 * 4096 * 93_320  # four blocks lie below the first new one


def test_all_of_its_8_36_billion_take_134_gb_before_the_first_token_and_150_without_recomputation():
    job = dataclasses.replace(real("meta-llama/Llama-2-7b-hf"), trained=Trained.all_of(40))
    assert job.num_trained == 8_357_482_496
    # Master, gradient and two moments in float32; a bf16 copy of the two tables, and of all but the norms.
    tables, norms = 2 * 32_000 * 4096, (2 * 40 + 1) * 4096
    assert states_bytes(job) == 16 * 8_357_482_496 + 2 * tables
    said = step_memory(job, next(policies(job)), micro_batch_size=1, accumulating=True)
    assert said.low_precision == 2 * (8_357_482_496 - norms)
    assert f"{states_bytes(job) / 1e9:.1f}" == "134.2"
    assert f"{(said.masters + said.gradients + said.moments + said.low_precision) / 1e9:.1f}" == "150.4"


def test_eight_bits_of_its_frozen_blocks_with_a_backward_are_5_67_gb():
    """Of 28 blocks; four lie below the first new one. Each element a byte, each input of a matrix a float32 scale."""
    job = real("meta-llama/Llama-2-7b-hf")
    plain, said = (
        step_memory(dataclasses.replace(job, eight_bits=e), next(policies(job)), micro_batch_size=2, accumulating=False)
        for e in (False, True)
    )
    assert said.transposed == 28 * (4 * 4096**2 + 3 * 4096 * 11008 + 4 * (3 * 4096 + 11008))
    assert f"{said.transposed / 1e9:.2f}" == "5.67"
    # Attention's backward is the fullest moment of a block, and has no codes beside it.
    assert said.total == plain.total + said.transposed


@pytest.mark.parametrize(
    ("hidden", "inner", "plain", "in_codes"),
    [
        # dy, d(SwiGLU); d(gate, up) is written over gate and up, or is in codes with a scale
        (64, 4096, 2 * 64 + 2 * 4096, 2 * 64 + 2 * 4096 + 2 * 4096 + 4),
        # dy, d(normed), ds; and codes of d(gate, up) and of ds
        (4096, 16, 6 * 4096, 6 * 4096 + 2 * 16 + 4 + 4096 + 4),
    ],
)
def test_codes_are_counted_where_a_kernel_writes_them(hidden, inner, plain, in_codes):
    spec = BlockSpec(
        hidden_size=hidden, intermediate_size=inner, num_heads=1, num_kv_heads=1, head_dim=16, norm_eps=1e-5
    )
    how = {"need_dx": False, "dtype": torch.bfloat16, "triton": True, "attention": "flash", "tokens": 1000}
    how |= {"sequences": 1, "documents": 0, "sharded": False, "summed": False}
    for eight_bits, expected in ((False, plain), (True, in_codes)):
        found = backward_peak(spec, BlockClass.FROZEN, Recompute.NONE, eight_bits=eight_bits, **how)
        assert found == 1000 * expected


def test_every_document_costs_flash_attention_128_rows():
    """dq in float32, and a number a head, for 128 rows more than a document has; padding makes documents too."""
    job = real("meta-llama/Llama-3.1-8B", seq_len=32_768)
    row = 4 * 32 * (128 + 1)
    totals = {}
    for document in (512, 64):
        changed = dataclasses.replace(job, document=document)
        totals[document] = step_memory(changed, next(policies(job)), micro_batch_size=1, accumulating=True).total
    boundaries = {512: 128, 64: 1024}  # of 1.25 · 32768 / document + 1 pieces, the next power of two
    assert totals[64] - totals[512] == 128 * row * (boundaries[64] - boundaries[512])


@pytest.mark.parametrize(
    ("attention", "heads", "kv_heads", "head_dim", "rows_of_q", "rows_of_kv", "padded_head_dim"),
    [
        ("flash_4", 32, 32, 128, 64, 128, 128),
        ("flash_4", 32, 8, 128, 64, 128, 128),
        ("flash_4", 32, 8, 96, 64, 128, 96),
        ("flash_4", 4, 2, 80, 64, 128, 96),
        ("flash_4", 32, 8, 64, 128, 128, 64),
        ("flash_4", 4, 2, 32, 128, 128, 32),
        ("flash_3", 32, 32, 128, 64, 128, 128),
        ("flash_3", 32, 8, 64, 128, 128, 64),
        ("flash_3", 4, 2, 32, 128, 128, 64),
        ("flash_3", 16, 8, 192, 64, 96, 192),
        ("flash_3", 16, 8, 256, 64, 80, 256),
    ],
)
def test_newer_flash_attention_pads_every_document_by_a_block(
    attention, heads, kv_heads, head_dim, rows_of_q, rows_of_kv, padded_head_dim
):
    """The shapes that a packed backward allocates in float32, on capability 9.

    Of flash-attn-4 4.0.0b36 (`_flash_attn_bwd` in cute/interface.py) as seen in a run up to its first kernel, of
    FlashAttention 3 as in its source (`mha_bwd` in hopper/flash_api.cpp).
    """
    tokens, documents = 1920, 16  # a multiple of every block
    q, kv = tokens + documents * rows_of_q, tokens + documents * rows_of_kv
    shapes = [(heads, q * padded_head_dim), (heads, q), (heads, q)]  # dq, o·do, lse
    if heads > kv_heads:
        shapes += 2 * [(kv_heads, kv * padded_head_dim)]
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    spec = block_spec(transformers.LlamaConfig(**sizes), 0)
    per_token, more = attention_scratch(attention, spec, 2, 4, tokens, 1, documents)
    assert tokens * per_token + more == 4 * sum(map(math.prod, shapes))
