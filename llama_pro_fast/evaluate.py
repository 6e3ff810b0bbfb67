"""Loss on held-out text, and the forgetting meter.

The meter needs no second model: an expanded model whose new blocks are skipped is its base. On general text it gives
the base's loss, the loss now, and KL(base ‖ now) per token; before the first step all differences are exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass

import torch

from llama_pro_fast.batch import IGNORE_INDEX, PackedBatch
from llama_pro_fast.config import RunConfig
from llama_pro_fast.console import say
from llama_pro_fast.data.corpus import Corpus
from llama_pro_fast.errors import UserError
from llama_pro_fast.model import Decoder
from llama_pro_fast.report import MetricsWriter


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
        now = model.hidden_states(batch)
        sums[0] += model.token_losses(now, batch.labels).double().sum()
        if skip_for_base:
            base = model.hidden_states(batch, skip=skip_for_base)
            sums[1] += model.token_losses(base, batch.labels).double().sum()
            valid = batch.labels != IGNORE_INDEX
            # `where`, not a product: a NaN outside the valid tokens must not leak in, one inside must show.
            sums[2] += torch.where(valid, model.token_kl(base, now).double(), 0.0).sum()
    assert tokens, "nothing to predict"
    loss, base_loss, kl = (sums / tokens).tolist()
    return Evaluation(
        loss=loss,
        tokens=tokens,
        base_loss=base_loss if skip_for_base else None,
        kl=kl if skip_for_base else None,
        bits_per_byte=loss * tokens / math.log(2) / num_bytes if num_bytes else None,
    )


class Meter:
    """Evaluation of every held-out source, and on the general ones how much of the base is left."""

    def __init__(
        self, model: Decoder, corpus: Corpus, config: RunConfig, metrics: MetricsWriter, new_blocks: tuple[int, ...]
    ) -> None:
        self.model, self.corpus, self.config, self.metrics = model, corpus, config, metrics
        self.new_blocks = new_blocks

    def measure(self, step: int) -> None:
        """Evaluate, say it and store it.

        Raises:
            UserError: a loss is not finite.
        """
        for text in self.corpus.held_out:
            source = text.source
            metered = source.role == "general" and len(self.new_blocks) > 0
            sample = text.sample(self.config.eval.tokens)
            result = evaluate(
                self.model,
                sample.batches(self.config.train.micro_batch_size),
                skip_for_base=self.new_blocks if metered else (),
                num_bytes=sample.num_bytes,
            )
            figures = [result.loss, *(value for value in (result.base_loss, result.kl) if value is not None)]
            if not all(map(math.isfinite, figures)):
                raise UserError(
                    f"step {step}: the loss on {source.name} is not finite ({_described(result)}); nothing was "
                    "saved since the last checkpoint. Lower --optim.lr and start again, or resume from that checkpoint"
                )
            self.metrics.write(
                "eval", step, source=source.name, role=source.role, measured=self.corpus.measured, **asdict(result)
            )
            say(f"  eval {step:>7}  {source.role:<7} {source.name:<16} {_described(result)}")


def _described(result: Evaluation) -> str:
    text = f"loss {result.loss:.4f}"
    if result.bits_per_byte is not None:
        text += f"  {result.bits_per_byte:.4f} bits/byte"
    if result.base_loss is None:
        return text
    return f"{text}  now-base {result.loss - result.base_loss:+.4f}  KL {result.kl:.4f}"
