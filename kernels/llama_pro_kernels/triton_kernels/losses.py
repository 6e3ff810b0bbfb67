"""The row-wise halves of the losses in Triton: what happens between a chunk's products.

One program a row of V logits. Cross entropy reads the row once to find maximum and sum together (online softmax,
Milakov & Gimelshein 2018) and, where the gradient is wanted, once more to write it over the logits. The rows that a GPU
works on at one time fit its L2 cache at V = 32,000 (660 rows of 64 KB on 132 multiprocessors) and do not at 128,256, so
the second reading is free there and paid for here. The KL divergence reads both rows twice: one pass would have to
subtract two large sums where the meter wants their small difference.

Cross entropy and divergence in one kernel have a floor of 3·V numbers a row, 6·V bytes in bf16: two rows read, one
written. The sums of a row are known at its end, so each row is read twice, 5·V in all; at V = 32,000 the rows of three
programs on each of 132 multiprocessors are the 50 MB that an H100's L2 cache holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import expect, launch, overwritten, writable_rows


@dataclass(frozen=True)
class RowLossConfig:
    """How a row of logits is walked.

    Attributes:
        block: logits at one time. 4,096 over 8 warps are 16 a thread, two 16-byte accesses of bf16; a reduction over
            the warps then comes once in 4,096 logits.
        num_warps: 8; a multiprocessor's registers hold five such programs, 40 warps.
    """

    block: int = 4096
    num_warps: int = 8

    def cut(self, vocab_size: int) -> dict[str, int]:
        """Options of a launch for rows of ``vocab_size``."""
        block = min(self.block, triton.next_power_of_2(vocab_size))
        return {"V": vocab_size, "BLOCK": block, "num_warps": self.num_warps}


CONFIG = RowLossConfig()


@triton.jit
def _log_sum_exp(row_ptr, V: tl.constexpr, BLOCK: tl.constexpr):
    """(shift, sum of exp(row − shift)), online; shift is the row's maximum, or 0 where that is −∞."""
    columns = tl.arange(0, BLOCK)
    largest = tl.full((), float("-inf"), tl.float32)
    shift = tl.full((), 0.0, tl.float32)
    totals = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        logits = tl.load(row_ptr + start + columns, mask=start + columns < V, other=float("-inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(largest, tl.max(logits, axis=0))
        # So far all −∞: any finite shift will do, and −∞ would make NaN of it.
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        totals = totals * tl.exp(before - shift) + tl.exp(logits - shift)
    return shift, tl.sum(totals, axis=0)


@triton.jit
def _label(row_ptr, label_ptr, ignore_index, V: tl.constexpr):
    """(valid, inside the vocabulary, its column or −1, its logit) of a row's label.

    One outside the vocabulary makes NaN of its row's loss and gradient; it never reads outside the row.
    """
    label = tl.load(label_ptr)
    valid = label != ignore_index
    inside = (label >= 0) & (label < V)
    label_logit = tl.load(row_ptr + label, mask=valid & inside, other=float("nan")).to(tl.float32)
    return valid, inside, tl.where(inside, label, -1).to(tl.int32), label_logit


@triton.jit
def _row_scale(scale_ptr, valid, inside):
    """Ignored: 0 times whatever is finite, and NaN if the row was not, which a zero would hide."""
    row_scale = tl.where(valid, tl.load(scale_ptr).to(tl.float32), 0.0)
    return tl.where(valid & (inside == 0), float("nan"), row_scale)


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, label_ptr, scale_ptr, loss_ptr, correct_ptr,
    logits_stride, label_stride, ignore_index,
    NEED_DLOGITS: tl.constexpr, NEED_CORRECT: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    columns = tl.arange(0, BLOCK)
    valid, inside, label_column, label_logit = _label(row_ptr, label_ptr + row * label_stride, ignore_index, V)

    shift, total = _log_sum_exp(row_ptr, V, BLOCK)
    loss = tl.log(total) + (shift - label_logit)
    tl.store(loss_ptr + row, tl.where(valid, loss, 0.0))

    if NEED_CORRECT:
        beaten = tl.zeros((BLOCK,), dtype=tl.int32)
        for start in range(0, V, BLOCK):
            at = start + columns
            logits = tl.load(row_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
            beats = (logits > label_logit) | ((logits == label_logit) & (at < label_column))
            beaten = beaten | beats.to(tl.int32)
        # The loss is not finite where a logit was NaN or the largest infinite: nothing was predicted there.
        correct = valid & inside & (tl.abs(loss) < float("inf")) & (tl.max(beaten, axis=0) == 0)
        tl.store(correct_ptr + row, correct.to(tl.int8))

    if NEED_DLOGITS:
        row_scale = _row_scale(scale_ptr, valid, inside)
        factor = row_scale / total
        for start in range(0, V, BLOCK):
            at = start + columns
            logits = tl.load(row_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
            dlogits = tl.exp(logits - shift) * factor - tl.where(at == label_column, row_scale, 0.0)
            tl.store(row_ptr + at, dlogits.to(logits_ptr.dtype.element_ty), mask=at < V)


@triton.jit
def _cross_entropy_kl_kernel(
    logits_ptr, base_ptr, label_ptr, scale_ptr, loss_ptr, divergence_ptr,
    logits_stride, base_stride, label_stride, ignore_index, kl_weight,
    NEED_DLOGITS: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    base_ptr += row * base_stride
    columns = tl.arange(0, BLOCK)
    valid, inside, label_column, label_logit = _label(row_ptr, label_ptr + row * label_stride, ignore_index, V)

    shift, total = _log_sum_exp(row_ptr, V, BLOCK)
    base_shift, base_total = _log_sum_exp(base_ptr, V, BLOCK)
    tl.store(loss_ptr + row, tl.where(valid, tl.log(total) + (shift - label_logit), 0.0))
    # Divided as IEEE says, equal sums have a ratio of exactly 1; the differences below are then 0, contracted or not.
    ratio = tl.div_rn(total, base_total)
    log_ratio = tl.log(ratio)

    row_scale = _row_scale(scale_ptr, valid, inside)
    factor = row_scale / total
    kl_factor = factor * tl.full((), kl_weight, tl.float32)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        at = start + columns
        logits = tl.load(row_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
        base = tl.load(base_ptr + at, mask=at < V, other=float("-inf")).to(tl.float32)
        base_exp = tl.exp(base - base_shift)
        # Logit from logit and sum from sum: what is close cancels exactly, before anything is rounded.
        difference = (base - logits) - (base_shift - shift) + log_ratio
        # What the base holds impossible adds nothing, however impossible it is now.
        sums += tl.where(base == float("-inf"), 0.0, base_exp * difference)
        if NEED_DLOGITS:
            exp = tl.exp(logits - shift)
            dlogits = exp * factor - tl.where(at == label_column, row_scale, 0.0)
            dlogits += kl_factor * (exp - base_exp * ratio)
            tl.store(row_ptr + at, dlogits.to(logits_ptr.dtype.element_ty), mask=at < V)
    tl.store(divergence_ptr + row, tl.where(valid, tl.sum(sums, axis=0) / base_total, 0.0))


@triton.jit
def _kl_kernel(
    base_ptr, now_ptr, divergence_ptr, base_stride, now_stride, V: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base_ptr += row * base_stride
    now_ptr += row * now_stride
    columns = tl.arange(0, BLOCK)
    base_shift, base_total = _log_sum_exp(base_ptr, V, BLOCK)
    now_shift, now_total = _log_sum_exp(now_ptr, V, BLOCK)
    # Subtracted one after the other: their sum is large, and would lose the digits that the divergence lives in.
    base_log, now_log = tl.log(base_total), tl.log(now_total)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        mask = start + columns < V
        base = tl.load(base_ptr + start + columns, mask=mask, other=0.0).to(tl.float32) - base_shift - base_log
        now = tl.load(now_ptr + start + columns, mask=mask, other=0.0).to(tl.float32) - now_shift - now_log
        sums += tl.where(mask, tl.exp(base) * (base - now), 0.0)
    tl.store(divergence_ptr + row, tl.sum(sums, axis=0))


def cross_entropy_(
    logits: Tensor, labels: Tensor, scale: Tensor, *, ignore_index: int, need_dlogits: bool, need_correct: bool = False
) -> tuple[Tensor, Tensor | None]:
    assert writable_rows(logits), "logits of a product are dense rows; in place, a copy would not do"
    num_tokens, vocab_size = logits.shape
    expect(labels=(labels, (num_tokens,)), scale=(scale, ()))
    losses = torch.empty(num_tokens, dtype=torch.float32, device=logits.device)
    correct = torch.empty(num_tokens, dtype=torch.bool, device=logits.device) if need_correct else None
    launch(
        _cross_entropy_kernel, (num_tokens,),
        logits, labels, scale, losses, None if correct is None else correct.view(torch.int8),
        logits.stride(0), labels.stride(0), ignore_index,
        NEED_DLOGITS=need_dlogits, NEED_CORRECT=need_correct, **CONFIG.cut(vocab_size),
    )  # fmt: skip
    if need_dlogits:
        overwritten(logits)
    return losses, correct


def cross_entropy_kl_(
    logits: Tensor, base_logits: Tensor, labels: Tensor, scale: Tensor, kl_weight: float, *, ignore_index: int,
    need_dlogits: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert writable_rows(logits), "logits of a product are dense rows; in place, a copy would not do"
    num_tokens, vocab_size = logits.shape
    expect(base_logits=(base_logits, logits.shape), labels=(labels, (num_tokens,)), scale=(scale, ()))
    base_logits = base_logits if base_logits.stride(-1) == 1 else base_logits.contiguous()
    losses, divergence = (torch.empty(num_tokens, dtype=torch.float32, device=logits.device) for _ in range(2))
    launch(
        _cross_entropy_kl_kernel, (num_tokens,),
        logits, base_logits, labels, scale, losses, divergence,
        logits.stride(0), base_logits.stride(0), labels.stride(0), ignore_index,
        float(kl_weight),  # an integer would be specialised
        NEED_DLOGITS=need_dlogits, **CONFIG.cut(vocab_size),
    )  # fmt: skip
    if need_dlogits:
        overwritten(logits)
    return losses, divergence


def kl_divergence(base_logits: Tensor, logits: Tensor) -> Tensor:
    expect(logits=(logits, base_logits.shape))
    base_logits, logits = (x if x.stride(-1) == 1 else x.contiguous() for x in (base_logits, logits))
    num_tokens, vocab_size = logits.shape
    divergence = torch.empty(num_tokens, dtype=torch.float32, device=logits.device)
    launch(
        _kl_kernel, (num_tokens,), base_logits, logits, divergence, base_logits.stride(0), logits.stride(0),
        **CONFIG.cut(vocab_size),
    )  # fmt: skip
    return divergence
