"""Loss on held-out text, of a model and of its base.

The meter needs no second model: an expanded model whose new blocks are skipped is its base. On general text it gives
the base's loss, the loss now, and KL(base ‖ now) per token; before the first step all differences are exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from llama_pro_fast.model.batch import IGNORE_INDEX, PackedBatch
from llama_pro_fast.model.decoder import Decoder


@dataclass(frozen=True)
class Evaluation:
    """Means over the valid tokens of a held-out text.

    Attributes:
        loss: cross-entropy, nats per token.
        tokens: how many tokens were predicted.
        base_loss: the same with the new blocks skipped; None where the base was not measured.
        kl: KL(base ‖ now), nats per token; None likewise.
        bits_per_byte: all nats as bits, over the UTF-8 bytes that the predicted tokens spell; comparable between
            tokenizers. None where there are no such bytes, or they are not known.
    """

    loss: float
    tokens: int
    base_loss: float | None = None
    kl: float | None = None
    bits_per_byte: float | None = None


@torch.no_grad()
def evaluate(
    model: Decoder,
    batches: Iterable[PackedBatch],
    *,
    skip_for_base: Collection[int] = (),
    num_bytes: int | None = None,
) -> Evaluation:
    """Measure ``model`` on ``batches``.

    Args:
        skip_for_base: the new blocks; given, the base is measured too.
        num_bytes: UTF-8 bytes that the valid tokens of all batches spell, to report bits per byte.

    Returns:
        Sums are taken in float64, so the order of magnitude of a long text costs no digits.
    """
    device = model.norm.weight.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    tokens = 0
    for batch in batches:
        tokens += batch.num_valid
        batch = batch.to(device)
        if not skip_for_base:
            now = model.hidden_states(batch)
            sums[0] += model.token_losses(now, batch.labels).double().sum()
            continue
        now, base = model.hidden_states_and_base(batch, skip=skip_for_base)
        kl, base_losses, losses = model.compare(now, base, batch.labels)
        # `where`, not a product: a NaN outside the valid tokens must not leak in, one inside must show.
        kl = torch.where(batch.labels != IGNORE_INDEX, kl, 0.0)
        sums += torch.stack([losses.double().sum(), base_losses.double().sum(), kl.double().sum()])
    assert tokens, "nothing to predict"
    loss, base_loss, kl = (sums / tokens).tolist()
    return Evaluation(
        loss=loss,
        tokens=tokens,
        base_loss=base_loss if skip_for_base else None,
        kl=kl if skip_for_base else None,
        bits_per_byte=loss * tokens / math.log(2) / num_bytes if num_bytes else None,
    )


def described(result: Evaluation) -> str:
    """An evaluation in half a line."""
    text = f"loss {result.loss:.4f}"
    if result.bits_per_byte is not None:
        text += f"  {result.bits_per_byte:.4f} bits/byte"
    if result.base_loss is None:
        return text
    return f"{text}  now-base {result.loss - result.base_loss:+.4f}  KL {result.kl:.4f}"
