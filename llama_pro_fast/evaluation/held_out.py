"""Loss on held-out text, of a model and of its base.

The meter needs no second model: an expanded model whose new blocks are skipped is its base. On general text it gives
the base's loss, the loss now, and KL(base ‖ now) per token; before the first step all differences are exactly 0. A
model that was expanded several times has several bases: it is held against the last and the first.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch

from llama_pro_fast.model.batch import IGNORE_INDEX, PackedBatch
from llama_pro_fast.model.decoder import Decoder
from llama_pro_fast.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Evaluation:
    """Means over the valid tokens of a held-out text.

    Attributes:
        loss: cross-entropy, nats per token.
        tokens: how many tokens were predicted.
        base_loss: the same with the newest generation's blocks skipped; None where that base was not measured.
        kl: KL(base ‖ now), nats per token; None likewise.
        first_base_loss: the same with the new blocks of all generations skipped; None where there is one generation,
            or that base was not measured.
        first_kl: KL(first base ‖ now), nats per token; None likewise.
        bits_per_byte: all nats as bits, over the UTF-8 bytes that the predicted tokens spell; comparable between
            tokenizers. None where there are no such bytes, or they are not known.
    """

    loss: float
    tokens: int
    base_loss: float | None = None
    kl: float | None = None
    first_base_loss: float | None = None
    first_kl: float | None = None
    bits_per_byte: float | None = None


@torch.no_grad()
def evaluate(
    model: Decoder,
    batches: Iterable[PackedBatch],
    *,
    skip_for_base: Collection[int] = (),
    skip_for_first_base: Collection[int] = (),
    num_bytes: int | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Measure ``model`` on ``batches``.

    Args:
        batches: of this rank.
        skip_for_base: the newest blocks; given, the base is measured too.
        skip_for_first_base: the new blocks of all generations; given, the first base is measured too.
        num_bytes: UTF-8 bytes that the valid tokens of all batches of all ranks spell, to report bits per byte.
        ranks: which measure together.

    Returns:
        Sums are taken in float64, so the order of magnitude of a long text costs no digits.
    """
    device = model.norm.weight.device
    bases = {"": skip_for_base, "first_": skip_for_first_base}
    bases = {name: skip for name, skip in bases.items() if skip}
    sums = torch.zeros(1 + 2 * len(bases), dtype=torch.float64, device=device)
    tokens = 0
    for batch in batches:
        tokens += batch.num_valid
        figures = token_figures(model, batch.to(device), list(bases.values()))
        sums += torch.stack([figure.double().sum() for figure in figures])
    tokens = sum(each for (each,) in ranks.table([tokens]))
    ranks.add([sums])
    assert tokens, "nothing to predict"
    loss, *figures = (sums / tokens).tolist()
    names = [prefix + figure for prefix in bases for figure in ("base_loss", "kl")]
    return Evaluation(
        loss=loss,
        tokens=tokens,
        bits_per_byte=loss * tokens / math.log(2) / num_bytes if num_bytes else None,
        **dict(zip(names, figures, strict=True)),
    )


@torch.no_grad()
def token_figures(model: Decoder, batch: PackedBatch, skips: Sequence[Collection[int]] = ()) -> list[torch.Tensor]:
    """Of each token of a batch that is on the model's device, ``[T]`` in nats and 0 where nothing is predicted.

    Args:
        skips: for each base in the model, the blocks without which it is that.

    Returns:
        The loss now, then for each base its loss and KL(base ‖ now).
    """
    if not skips:
        return [model.token_losses(model.hidden_states(batch), batch.labels)]
    now, *bases = model.hidden_states_and_bases(batch, skips=skips)
    return compared(model, now, bases, batch.labels)


def compared(
    model: Decoder,
    now: torch.Tensor,
    bases: list[torch.Tensor],
    labels: torch.Tensor,
    *,
    base_head: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """:func:`token_figures` from final hidden states.

    Args:
        bases: emptied on the way, so that each is let go of.
        base_head: as in :meth:`Decoder.compare`.
    """
    found = []
    while bases:
        kl, base_losses, losses = model.compare(now, bases.pop(0), labels, base_head=base_head)
        # `where`, not a product: a NaN outside the valid tokens must not leak in, one inside must show.
        found += [base_losses, torch.where(labels != IGNORE_INDEX, kl, 0.0)]
    return [losses, *found]


def described(result: Evaluation) -> str:
    """An evaluation in half a line."""
    text = f"loss {result.loss:.4f}"
    if result.bits_per_byte is not None:
        text += f"  {result.bits_per_byte:.4f} bits/byte"
    for name, base_loss, kl in (
        ("base", result.base_loss, result.kl),
        ("first base", result.first_base_loss, result.first_kl),
    ):
        if base_loss is not None:
            text += f"  now-{name} {result.loss - base_loss:+.4f}  KL {kl:.4f}"
    return text
