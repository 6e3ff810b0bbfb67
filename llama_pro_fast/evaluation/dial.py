"""The dial: what a finished run would have learned and forgotten, had its new blocks added only a part of what they do.

An export scales them (`llama-pro-fast export RUN OUT --scale A`). The model in memory is scaled here in place, so a
look at several scales costs a few evaluations, no training and no second model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from llama_pro_fast.data.corpus import HeldOut
from llama_pro_fast.evaluation.held_out import evaluate
from llama_pro_fast.hf.families import HF_MODULES
from llama_pro_fast.model.decoder import Decoder

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)

LEAST_TOKENS, SHARE = 2048, 80
"""A sweep passes over the tokens it measures some fourteen times, nine of them on general text. So in a short run it
measures fewer than the run's evaluations did: one for so many that were trained on, and at least so many."""

OURS = {names[0]: ours for ours, names in HF_MODULES.items() if len(names) == 1}


def num_tokens(evaluated: int, trained: int) -> int:
    """How many tokens of a text a sweep measures at most, of a run whose evaluations measured ``evaluated`` and which
    trained on ``trained``."""
    return min(evaluated, max(LEAST_TOKENS, trained // SHARE))


@torch.no_grad()
def sweep(
    model: Decoder,
    texts: Sequence[HeldOut],
    zeroed: Mapping[int, Collection[str]],
    *,
    tokens: int,
    micro_batch: int,
    progress: Callable[[str], None] = lambda said: None,
) -> list[dict[str, Any]]:
    """Measure ``model`` on held-out texts at each of :data:`SCALES`; it is left as it was.

    All scales are of the weights as they are here, so their figures differ by the scale alone.

    Args:
        zeroed: of each new block the modules that are scaled, by Hugging Face's names; without these blocks the model
            is its base.
        tokens: of each text measured at most (:func:`num_tokens`).
        micro_batch: sequences at a time.
        progress: is told what is being measured.

    Returns:
        For each scale and text ``scale``, ``role``, ``source``, ``tokens`` (predicted), ``loss`` (nats per token),
        ``base_loss`` (at scale 0) and on general text ``kl``, KL(base ‖ scaled) in nats per token.
    """
    layers = [getattr(model.blocks[index], OURS[name]) for index, names in zeroed.items() for name in names]
    tensors = [tensor for layer in layers for tensor in (layer.weight, layer.bias) if tensor is not None]
    originals = [tensor.clone() for tensor in tensors]
    rows, base_losses = [], {}
    try:
        for scale in SCALES:
            for tensor, original in zip(tensors, originals, strict=True):
                torch.mul(original, scale, out=tensor)
            for text in texts:
                role, source = text.source.role, text.source.name
                progress(f"new blocks times {scale:g}: evaluating {source} ...")
                metered = role == "general"
                found = evaluate(
                    model, text.sample(tokens).batches(micro_batch), skip_for_base=zeroed if metered and scale else ()
                )
                base_loss = base_losses.setdefault((role, source), found.loss)
                kl = (found.kl or 0.0) if metered else None
                rows.append({"scale": scale, "role": role, "source": source, "tokens": found.tokens,
                             "loss": found.loss, "base_loss": base_loss, "kl": kl})  # fmt: skip
    finally:
        for tensor, original in zip(tensors, originals, strict=True):
            tensor.copy_(original)
    return rows


def said(rows: Sequence[Mapping[str, Any]]) -> str:
    """What of a sweep helps to choose, in a sentence; empty where nothing was gained.

    Two scales are named, if there are such: the one with most of the gain at which no general text is predicted worse
    than by the base; and, where that leaves much behind, the one whose share of the gain is farthest above its share of
    the forgetting. Of several texts the changes of the loss count in sum, of general ones those that rose.
    """

    def changes(role: str, scale: float) -> list[float]:
        return [row["loss"] - row["base_loss"] for row in rows if (row["role"], row["scale"]) == (role, scale)]

    gain = {scale: -sum(changes("domain", scale)) for scale in SCALES[1:]}
    forgotten = {scale: sum(max(0.0, rise) for rise in changes("general", scale)) for scale in SCALES[1:]}
    if not gain[1.0] > 0:
        return ""
    kept = {scale: value / gain[1.0] for scale, value in gain.items() if value > 0}
    unharmed = "of the gain, and no general text is predicted worse than by the base"
    if forgotten[1.0] == 0:
        return f"scale 1, the model as trained, has all {unharmed}"
    lead = {scale: share - forgotten[scale] / forgotten[1.0] for scale, share in kept.items()}
    found = {}
    if harmless := [scale for scale in kept if forgotten[scale] == 0]:
        best = max(harmless, key=kept.__getitem__)
        found[best] = f"scale {best:g} keeps {math.floor(100 * kept[best])}% {unharmed}"
    ahead = max(lead, key=lead.__getitem__)
    if lead[ahead] > 0 and forgotten[ahead] > 0:
        share, lost = math.floor(100 * kept[ahead]), math.ceil(100 * forgotten[ahead] / forgotten[1.0])
        found[ahead] = f"scale {ahead:g} keeps {share}% of the gain and {lost}% of the forgetting"
    if not found:
        return ""
    which = f"{next(iter(found)):g}" if len(found) == 1 else "A"
    return f"{'; '.join(found.values())}: llama-pro-fast export RUN OUT --scale {which}"
