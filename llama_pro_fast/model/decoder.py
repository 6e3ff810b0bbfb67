"""The whole decoder: embedding, blocks, final norm, head.

Which blocks train decides everything else: the embedding and the blocks below the lowest trained one run without a
graph, the blocks above it only pass the gradient on. Skipping the new blocks of an expanded model gives back the model
it was made from, so the base's loss can be measured at any time without a second copy of the weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from llama_pro_fast.model.batch import BlockContext, PackedBatch
from llama_pro_fast.model.block import Block
from llama_pro_fast.model.layers import Embedding, RMSNorm
from llama_pro_fast.model.policy import BlockClass
from llama_pro_kernels import (
    LinearKLOutput,
    linear_cross_entropy,
    linear_cross_entropy_forward,
    linear_cross_entropy_kl,
    linear_kl_with_losses,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What a model may compute in, by the name a recipe has for it."""


class Decoder(nn.Module):
    """A Llama-family language model on packed batches.

    Attributes:
        blocks: the decoder blocks, bottom to top.
        trained_blocks: their indices that train.
        lm_head: the output table; the very module `embed_tokens` when the two are tied.
    """

    def __init__(
        self,
        *,
        embed_tokens: Embedding,
        blocks: Iterable[Block],
        norm: RMSNorm,
        lm_head: Embedding | None,
        rotary_tables: tuple[torch.Tensor, torch.Tensor],
        attention: str,
    ) -> None:
        super().__init__()
        self.embed_tokens = embed_tokens
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.lm_head = embed_tokens if lm_head is None else lm_head
        self.register_buffer("cos", rotary_tables[0], persistent=False)
        self.register_buffer("sin", rotary_tables[1], persistent=False)
        self.attention = attention

    @property
    def trained_blocks(self) -> list[int]:
        return [index for index, block in enumerate(self.blocks) if block.block_class is BlockClass.TRAINED]

    def accumulate(self) -> None:
        """Let the blocks that train add their gradients up themselves (`Block.accumulates`), for steps of several
        micro-batches."""
        for index in self.trained_blocks:
            self.blocks[index].accumulates = True

    def hidden_states(self, batch: PackedBatch, *, skip: Collection[int] = ()) -> torch.Tensor:
        """The final norm's output ``[T, H]`` in the compute dtype; blocks in ``skip`` are left out."""
        return self._above(0, self.embed_tokens(batch.input_ids), self._context(batch), skip)

    def hidden_states_and_bases(self, batch: PackedBatch, *, skips: Sequence[Collection[int]]) -> list[torch.Tensor]:
        """The final norm's output of the model, and for each of ``skips`` of the model without these blocks; what lies
        below the lowest of them all runs once."""
        context, first = self._context(batch), min(map(min, skips))
        shared = [self._below(first, batch, context)] * (1 + len(skips))
        # The last to take it lets go of it.
        return [self._above(first, shared.pop(), context, skip) for skip in ((), *skips)]

    def _below(self, first: int, batch: PackedBatch, context: BlockContext) -> torch.Tensor:
        x = self.embed_tokens(batch.input_ids)
        for block in self.blocks[:first]:
            x = block(x, context)
        return x

    def _above(self, first: int, x: torch.Tensor, context: BlockContext, skip: Collection[int] = ()) -> torch.Tensor:
        for index, block in enumerate(self.blocks[first:], start=first):
            if index not in skip:
                x = block(x, context)
        return self.norm(x)

    def _context(self, batch: PackedBatch) -> BlockContext:
        return BlockContext.for_batch(batch, rotary_tables=(self.cos, self.sin), attention=self.attention)

    def logits(self, batch: PackedBatch) -> torch.Tensor:
        """``[T, V]``, all at once: for tests and for generating, not for training."""
        return F.linear(self.hidden_states(batch), self.lm_head.weight_in_compute_dtype)

    def loss(self, batch: PackedBatch, scale: torch.Tensor) -> torch.Tensor:
        """``scale`` × the summed cross-entropy (nats) of the batch's valid tokens, differentiable.

        Args:
            scale: device scalar; 1 / valid tokens of the whole optimizer step makes the step's loss a mean.
        """
        head = self.lm_head
        x = self.hidden_states(batch)
        return linear_cross_entropy(
            x, head.weight, batch.labels, scale, low_precision_weight=head.low_precision, consume=True
        )

    def loss_beside_base(
        self, batch: PackedBatch, scale: torch.Tensor, kl_weight: float, *, skip: Collection[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`loss`, and ``kl_weight`` × ``scale`` × the summed KL(base ‖ now) of the batch's general tokens.

        The base is this model without the blocks in ``skip``, which are those that train: what lies below them runs
        once, and the blocks above once more for the general tokens, without a graph.

        Returns:
            The sum of both, differentiable; and ``scale`` × the summed divergence (nats).
        """
        if not batch.num_general:
            return self.loss(batch, scale), scale.new_zeros(())
        head, context = self.lm_head.weight_in_compute_dtype, self._context(batch)
        general, first = batch.general, min(skip)
        x = self._below(first, batch, context)
        with torch.no_grad():
            base = self._above(first, x[-batch.num_general :], self._context(general), skip)
        x = self._above(first, x, context)
        x, x_general = x.split([len(x) - batch.num_general, batch.num_general])
        loss, _, divergence = linear_cross_entropy_kl(
            x_general, base, head, general.labels, scale, kl_weight, consume=True
        )
        if len(x):
            loss = loss + linear_cross_entropy(x, head, batch.labels[: len(x)], scale, consume=True)
        return loss, divergence

    @torch.no_grad()
    def token_losses(self, hidden_states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy ``[T]`` in nats, 0 where the label is ignored."""
        one = torch.ones((), dtype=torch.float32, device=labels.device)
        return linear_cross_entropy_forward(
            hidden_states,
            self.lm_head.weight_in_compute_dtype,
            labels,
            one,
            need_dx=False,
            need_dweight=False,
            per_token=True,
        ).token_losses

    @torch.no_grad()
    def compare(
        self, now: torch.Tensor, base: torch.Tensor, labels: torch.Tensor, *, base_head: torch.Tensor | None = None
    ) -> LinearKLOutput:
        """KL(base ‖ now) and both losses ``[T]`` in nats, from the final hidden states of the two; the losses are 0
        where the label is ignored.

        Args:
            base_head: ``[V, H_base]``, the head of a base that is another model.
        """
        return linear_kl_with_losses(base, now, self.lm_head.weight_in_compute_dtype, labels, weight_base=base_head)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.named_parameters() if p.requires_grad}
