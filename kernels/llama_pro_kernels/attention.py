"""Causal attention within the documents of a packed row, over interchangeable backends.

    flash        PyTorch's FlashAttention 2 for CUDA, one call for all documents; boundaries never leave the device.
    flash_3      FlashAttention 3 behind the same call, where its package is installed.
    flash_4      the package flash-attn-4 (FlashAttention 4).
    flash_attn   the package flash-attn (FlashAttention 2).
    cudnn        cuDNN's packed attention.
    cpu_flash    PyTorch's flash attention for the CPU, one call a document.
    reference    scores written out, any dtype and device; the definition. Quadratic memory, and it asks the device for
                 the document boundaries: for tests and for what nothing else can do.

A run asks ``select_attention_backend`` once and hands the name to every call, so that the choice can be printed, stored
and repeated. ``lse``, the log-sum-exp of the scaled scores, is what backward needs beside inputs and output; it belongs
to its backend, and another's backward may not take it.

Documents are given by ``cu_seqlens`` ``[C]`` int32, non-decreasing from 0 to T. Two equal neighbours are an empty
document and mean nothing.

FLOPs are counted as they are needed: pairs of a query and a key that it sees, causal, within a document and its window,
4·N·D a pair forward and 10·N·D backward (five products, as flash attention recomputes the scores). PyTorch's own
counter ignores causality, and counts its flash attention for the CPU as 0. To count, the boundaries are read from the
device; where they have no values (fake tensors), documents of ``max_seqlen`` fill the tokens.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

from .attention_backends import KERNELS, Kernels
from .library import register
from .reference import accumulation_dtype

__all__ = ["attention", "attention_backward", "attention_forward"]


def _kernels(backend: str) -> Kernels:
    assert backend in KERNELS, f"unknown attention backend {backend!r}"
    return KERNELS[backend]


def _dense_heads(x: Tensor) -> Tensor:
    """The kernels take any strides but the last: flash refuses, the CPU's reads the wrong numbers."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _visible_pairs(cu_seqlens: Tensor, max_seqlen: int, window: int | None, num_tokens: int) -> int:
    """How many pairs of a query and a key that it sees a batch has."""
    if isinstance(cu_seqlens, FakeTensor) or cu_seqlens.is_meta:
        full, rest = divmod(num_tokens, max(max_seqlen, 1))
        lengths = [max_seqlen] * full + [rest]
    else:
        lengths = [stop - start for start, stop in pairwise(cu_seqlens.tolist())]
    pairs = 0
    for length in lengths:
        widest = length if window is None else min(window, length)
        pairs += widest * (widest + 1) // 2 + (length - widest) * widest
    return pairs


def _count_forward_flops(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None, backend: str
) -> int:
    return 4 * q.shape[1] * q.shape[2] * _visible_pairs(cu_seqlens, max_seqlen, window, len(q))


def _count_backward_flops(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *rest: Any) -> int:
    return _count_forward_flops(q, k, v, *rest) * 5 // 2


@register(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, SymInt max_seqlen, float scale,"
    " SymInt? window, str backend) -> (Tensor, Tensor)",
    fake=lambda q, k, v, cu_seqlens, max_seqlen, scale, window, backend: (
        q.new_empty(q.shape),
        q.new_empty((q.shape[1], q.shape[0]), dtype=accumulation_dtype(q.dtype)),
    ),
    flops=_count_forward_flops,
)
def _attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None, backend: str
) -> tuple[Tensor, Tensor]:
    q, k, v = (_dense_heads(tensor) for tensor in (q, k, v))
    o, lse = _kernels(backend).forward(q, k, v, cu_seqlens, max_seqlen, scale, window)
    return o.contiguous(), lse.contiguous()


@register(
    "attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor cu_seqlens,"
    " SymInt max_seqlen, float scale, SymInt? window, str backend) -> (Tensor, Tensor, Tensor)",
    fake=lambda do, q, k, v, *_: tuple(tensor.new_empty(tensor.shape) for tensor in (q, k, v)),
    flops=_count_backward_flops,
)
def _attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    scale: float, window: int | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    do, q, k, v, o = (_dense_heads(tensor) for tensor in (do, q, k, v, o))
    gradients = _kernels(backend).backward(do, q, k, v, o, lse, cu_seqlens, max_seqlen, scale, window)
    return tuple(gradient.contiguous() for gradient in gradients)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    window: int | None = None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Causal attention within documents.

    Args:
        q: ``[T, N, D]``.
        k: ``[T, K, D]``, K divides N; query head n reads key head n // (N/K).
        v: ``[T, K, D]``.
        cu_seqlens: ``[C]`` int32, document boundaries from 0 to T; empty documents are legal.
        max_seqlen: upper bound on a document's length.
        scale: factor on the scores, usually D^-½.
        window: how many keys a query sees, itself included (as in Hugging Face); None for all before it.
        backend: from ``select_attention_backend``.

    Returns:
        ``(o, lse)``, contiguous: ``[T, N, D]`` in ``q``'s dtype; ``[N, T]`` in the accumulation dtype.
    """
    return _attention_forward(q, k, v, cu_seqlens, max_seqlen, scale, window, backend)


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    window: int | None = None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attention_forward`.

    Args:
        do: ``[T, N, D]``, gradient of ``o``.
        o, lse: from forward, of the same backend.
        q, k, v, cu_seqlens, max_seqlen, scale, window, backend: as in forward.

    Returns:
        ``(dq, dk, dv)``, shaped and typed like ``q``, ``k``, ``v``, contiguous.
    """
    return _attention_backward(do, q, k, v, o, lse, cu_seqlens, max_seqlen, scale, window, backend)


class _Attention(torch.autograd.Function):
    """Keeps q, k, v, o and lse; no scores."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        scale: float,
        window: int | None,
        backend: str,
    ) -> Tensor:
        o, lse = attention_forward(q, k, v, cu_seqlens, max_seqlen, scale=scale, window=window, backend=backend)
        ctx.save_for_backward(q, k, v, o, lse, cu_seqlens)
        ctx.max_seqlen = max_seqlen
        ctx.options = {"scale": scale, "window": window, "backend": backend}
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        gradients = attention_backward(do, *ctx.saved_tensors, ctx.max_seqlen, **ctx.options)
        return *gradients, None, None, None, None, None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    scale: float,
    window: int | None = None,
    backend: str,
) -> Tensor:
    """Differentiable :func:`attention_forward`, returning ``o`` ``[T, N, D]``."""
    return _Attention.apply(q, k, v, cu_seqlens, max_seqlen, scale, window, backend)
