"""What a contestant keeps for backward and computes, counted on a CPU at a size's full width; nothing is timed.

Bytes and FLOPs a token do not depend on how many tokens there are (attention's aside, which is not counted here), so
a few will do. Computed in bf16, as on a GPU, with the same means as bench/miniature.py.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from contestants import CONTESTANTS
from miniature import count_work, kept_by_layer, layer_classes
from workload import Workload

TOKENS = 32
"""Of each of two sequences."""


@dataclass(frozen=True, kw_only=True)
class Narrow(Workload):
    """In bf16 on every device."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16


def count(contestant: str, workload: Workload) -> dict[str, Any]:
    """Bytes kept a token by class of block, and products of a step of ``workload``, in a process of its own."""
    values = {field.name: getattr(workload, field.name) for field in fields(workload)}
    narrow = Narrow(**(values | {"seq": TOKENS, "micro_batch": 2, "document": None}))
    runner = CONTESTANTS[contestant].build(narrow)
    kept = kept_by_layer(runner, narrow, layer_classes(narrow))["kept a token"]
    batch = runner.prepare(next(narrow.token_batches())[:1])
    products = count_work(runner, batch, narrow)["products"]
    return {
        "kept_bytes_per_token": {name: float(size) for name, size in kept.items()},
        "products_flop": products * workload.micro_batch * workload.seq // (2 * TOKENS),
    }
