"""What a model makes of a text, beside what a base makes of it.

A base is in the model (without its new blocks), or it is another model, which reads the text before this one is loaded:
of it only the final hidden states are kept, in host memory, and the head. Losses are kept of every token, so that they
can be added up by document: documents are what a text is a sample of, and the standard error is over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llama_pro_fast.data.sample import HeldOutSample
from llama_pro_fast.evaluation.held_out import compared, token_figures
from llama_pro_fast.model.batch import IGNORE_INDEX
from llama_pro_fast.model.decoder import Decoder

Watch = Callable[[int], Any]
"""Told how many batches are done, before each; what it raises ends the work."""


@dataclass(frozen=True, kw_only=True)
class Against:
    """What a base makes of a text, and how far the model is from it.

    Attributes:
        loss: the base's, nats per token of its own.
        bits_per_byte: the base's; None where there are no bytes.
        change: the loss now less the base's, nats per token; None where the two cut the text into other tokens.
        change_se: its standard error, paired over documents; None where ``change`` is, and of a single document.
        kl: KL(base ‖ now), nats per token; None where the two predict other tokens.
    """

    loss: float
    bits_per_byte: float | None
    change: float | None
    change_se: float | None
    kl: float | None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a model makes of a text.

    Attributes:
        documents: how many, the last perhaps cut.
        tokens: how many were predicted.
        loss: cross-entropy, nats per token.
        bits_per_byte: all nats as bits, over the UTF-8 bytes that the predicted tokens spell; None where these are 0.
        base, first_base: what it is held against; None where there is no such base.
        note: why a figure is missing, in words; empty where none is.
    """

    documents: int
    tokens: int
    loss: float
    bits_per_byte: float | None
    base: Against | None = None
    first_base: Against | None = None
    note: str = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Figures:
        """The inverse of :func:`dataclasses.asdict`."""
        bases = {name: values[name] and Against(**values[name]) for name in ("base", "first_base")}
        return cls(**{**values, **bases})


@dataclass(frozen=True)
class BaseText:
    """What another model made of a text, before the model that is held against it is loaded.

    Attributes:
        sample: the text, in its tokens.
        losses: ``[T]`` float64, nats.
        tokens: how many were predicted.
        states: ``[T, H]`` in the compute dtype, on the host; None where predictions cannot be compared.
    """

    sample: HeldOutSample
    losses: np.ndarray
    tokens: int
    states: torch.Tensor | None


@torch.no_grad()
def read_by_base(
    model: Decoder, sample: HeldOutSample, *, micro_batch: int, keep_states: bool, watch: Watch
) -> BaseText:
    """Run a base that is another model over a text.

    Args:
        keep_states: whether its predictions will be compared.
    """
    device, losses, states, tokens, at = model.norm.weight.device, [], None, 0, 0
    for done, batch in enumerate(sample.batches(micro_batch)):
        watch(done)
        tokens += batch.num_valid
        batch = batch.to(device)
        hidden = model.hidden_states(batch)
        losses.append(model.token_losses(hidden, batch.labels).double().cpu())
        if keep_states:
            states = hidden.new_empty(sample.num_tokens, hidden.shape[1], device="cpu") if states is None else states
            states[at : at + len(hidden)] = hidden
            at += len(hidden)
    return BaseText(sample, torch.cat(losses).numpy(), tokens, states)


@torch.no_grad()
def measure(
    model: Decoder,
    sample: HeldOutSample,
    *,
    micro_batch: int,
    skips: Mapping[str, Collection[int]],
    other: BaseText | None = None,
    other_head: torch.Tensor | None = None,
    watch: Watch,
) -> Figures:
    """The figures of a text.

    Args:
        skips: for ``base`` and ``first_base``, where they are in the model, the blocks without which it is that.
        other: in place of them, what another model made of the text.
        other_head: ``[V, H_base]``, its head, on the model's device.
    """
    device, found, predicted, at = model.norm.weight.device, [], [], 0
    for done, batch in enumerate(sample.batches(micro_batch)):
        watch(done)
        predicted.append(batch.labels != IGNORE_INDEX)
        batch = batch.to(device)
        if other is None or other.states is None:
            figures = token_figures(model, batch, list(skips.values()))
        else:
            base = other.states[at : at + len(batch.labels)].to(device)
            figures = compared(model, model.hidden_states(batch), [base], batch.labels, base_head=other_head)
        at += len(batch.labels)
        found.append(torch.stack([figure.double() for figure in figures]).cpu())
    values = torch.cat(found, dim=1).numpy()
    counts = sample.per_document(torch.cat(predicted).numpy().astype(np.int64))
    sums = sample.per_document(values)
    if other is None:
        bases = {name: _against(sample, counts, *sums[[0, 1 + 2 * n, 2 + 2 * n]]) for n, name in enumerate(skips)}
    elif other.states is not None:
        bases = {"base": _against(sample, counts, *sums)}
    elif other.sample is sample:  # the same tokens, predicted out of another vocabulary
        bases = {"base": _against(sample, counts, sums[0], sample.per_document(other.losses), None)}
    else:
        loss = float(other.losses.sum() / other.tokens)
        bits = _bits_per_byte(other.losses.sum(), other.sample)
        bases = {"base": Against(loss=loss, bits_per_byte=bits, change=None, change_se=None, kl=None)}
    return Figures(
        documents=len(counts),
        tokens=int(counts.sum()),
        loss=float(sums[0].sum() / counts.sum()),
        bits_per_byte=_bits_per_byte(sums[0].sum(), sample),
        **bases,
    )


def _against(
    sample: HeldOutSample, counts: np.ndarray, losses: np.ndarray, base_losses: np.ndarray, kl: np.ndarray | None
) -> Against:
    """From sums over documents, ``[documents]``."""
    total = counts.sum()
    return Against(
        loss=float(base_losses.sum() / total),
        bits_per_byte=_bits_per_byte(base_losses.sum(), sample),
        change=float((losses - base_losses).sum() / total),
        change_se=standard_error(losses - base_losses, counts),
        kl=None if kl is None else float(kl.sum() / total),
    )


def standard_error(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """Of a mean over all tokens, ``Σ sums / Σ counts``, when documents are drawn and not tokens.

    The mean is a ratio of two sums over documents, so to first order its error is that of the sum of
    ``sums − mean · counts`` (Cochran, Sampling Techniques, chapter 6).

    Args:
        sums, counts: ``[documents]``.

    Returns:
        None of fewer than two documents with tokens.
    """
    number = np.count_nonzero(counts)
    if number < 2:
        return None
    residuals = sums - sums.sum() / counts.sum() * counts
    return float(math.sqrt(number / (number - 1) * (residuals**2).sum()) / counts.sum())


def _bits_per_byte(nats: float, sample: HeldOutSample) -> float | None:
    return float(nats) / math.log(2) / sample.num_bytes if sample.num_bytes else None
