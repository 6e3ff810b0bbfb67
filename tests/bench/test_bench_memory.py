"""bench/memory.py beside Hugging Face: its layer's bytes by hand. What ours keeps is held in tests/model."""

from __future__ import annotations

import memory
import torch

from llama_pro_fast.model.spec import BlockSpec


def test_what_a_frozen_layer_of_hugging_face_keeps():
    spec = BlockSpec(hidden_size=64, intermediate_size=172, num_heads=4, num_kv_heads=4, head_dim=16, norm_eps=1e-5)
    H, I, N = 64, 172, 4
    torch.manual_seed(0)
    frozen = memory.hugging_face_bytes(spec, trained=False, tokens=(8, 24))
    # In bf16: q, k, v and o, gate, up, SiLU(gate); in fp32 both norms' inputs widened and rstd, and attention's lse.
    assert frozen == 2 * (4 * H + 3 * I) + 4 * (2 * H + 2) + 4 * N
    assert memory.hugging_face_bytes(spec, trained=True, tokens=(8, 24)) > frozen
