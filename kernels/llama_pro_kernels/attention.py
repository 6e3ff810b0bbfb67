"""Causal attention within the documents of a packed row, over interchangeable backends.

    reference   scores written out, any dtype and device; the definition. Quadratic memory, and it asks the device for
                the document boundaries: for tests and for what nothing else can do.
    cpu_flash   PyTorch's flash attention for the CPU, one call a document.
    flash       PyTorch's flash attention for CUDA, one call for all documents; boundaries never leave the device.

A run asks :func:`select_attention_backend` once and hands the name to every call, so that the choice can be printed,
stored and repeated. ``lse``, the log-sum-exp of the scaled scores, is what backward needs beside inputs and output.

Documents are given by ``cu_seqlens`` ``[C]`` int32, non-decreasing from 0 to T. Two equal neighbours are an empty
document and mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import attention_document_backward, attention_document_forward, compute_dtype

__all__ = ["attention", "attention_backward", "attention_forward", "select_attention_backend"]

_BACKENDS = ("flash", "cpu_flash", "reference")


def select_attention_backend(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    requested: str = "auto",
    window: int | None = None,
    deterministic: bool = False,
) -> str:
    """The backend for a run: the fastest that can serve it, or the requested one if it can.

    Args:
        device: where q, k and v live.
        dtype: their dtype.
        requested: a backend's name, or "auto".
        window: sliding window, None for none.
        deterministic: whether backward must sum in a fixed order.

    Raises:
        ValueError: the requested backend is unknown or cannot serve the run; or a deterministic run would get "flash"
            while ``torch.use_deterministic_algorithms(True)`` is not set, the only switch its backward obeys.
    """
    device = torch.device(device)
    obstacles = {name: _obstacle(name, device, dtype, window) for name in _BACKENDS}
    available = [name for name in _BACKENDS if obstacles[name] is None]
    backend = available[0] if requested == "auto" else requested
    if backend not in available:
        reason = obstacles.get(backend, "there is no such backend")
        raise ValueError(f"attention backend {backend!r}: {reason}; available here: auto, {', '.join(available)}")
    if deterministic and backend == "flash" and not torch.are_deterministic_algorithms_enabled():
        raise ValueError(
            "attention backend 'flash': its backward is deterministic only under "
            "torch.use_deterministic_algorithms(True); set that first or ask for 'reference'"
        )
    return backend


def _obstacle(backend: str, device: torch.device, dtype: torch.dtype, window: int | None) -> str | None:
    """Why ``backend`` cannot serve, or None."""
    if backend == "cpu_flash":
        if device.type != "cpu":
            return f"runs on the CPU, not on {device.type}"
        if window is not None:
            return "has no sliding window"
    if backend == "flash":
        if device.type != "cuda":
            return f"runs on CUDA, not on {device.type}"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"computes in bfloat16 or float16, not in {str(dtype).removeprefix('torch.')}"
        if not torch.cuda.is_available():
            return "finds no CUDA device"
        if not torch.backends.cuda.is_flash_attention_available():
            return "is not part of this build of PyTorch"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return f"needs compute capability 8.0, and {torch.cuda.get_device_name(device)} is older"
    return None


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
        backend: from :func:`select_attention_backend`.

    Returns:
        ``(o, lse)``: ``[T, N, D]`` in ``q``'s dtype; ``[N, T]`` in the compute dtype.
    """
    q, k, v = (_dense_heads(tensor) for tensor in (q, k, v))
    if backend == "flash":
        o, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, window is None, False,
            scale=scale, **_flash_window(window),
        )  # fmt: skip
        return o, lse
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=compute_dtype(q.dtype), device=q.device)
    for rows in _documents(cu_seqlens, len(q)):
        if backend == "reference":
            o[rows], lse[:, rows] = attention_document_forward(q[rows], k[rows], v[rows], scale=scale, window=window)
        else:
            _assert_cpu_flash(backend, window)
            o_doc, lse_doc = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *(_heads_first(tensor[rows]) for tensor in (q, k, v)), 0.0, True, scale=scale
            )
            o[rows], lse[:, rows] = _heads_last(o_doc), lse_doc[0]
    if backend == "cpu_flash":
        # The kernel takes a row of scores that are all NaN for a masked one and returns zeros (pytorch issue 141128).
        # A query sees its own key, so whatever fills its row with NaN is in one of the two.
        poison = _zero_or_nan(q).unflatten(1, (k.shape[1], -1)).add_(_zero_or_nan(k)[..., None]).flatten(1)
        o.add_(poison[..., None])
        lse.add_(poison.t())
    return o, lse


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
        ``(dq, dk, dv)``, shaped and typed like ``q``, ``k``, ``v``.
    """
    do, q, k, v, o = (_dense_heads(tensor) for tensor in (do, q, k, v, o))
    if backend == "flash":
        # Without dropout the kernel reads neither the generator's state nor the tensor its signature calls unused.
        rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty(0, device=q.device)
        return torch.ops.aten._flash_attention_backward(
            do, q, k, v, o, lse, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 0.0, window is None,
            rng_state, unused, scale=scale, **_flash_window(window),
        )  # fmt: skip
    dq, dk, dv = (torch.empty(tensor.shape, dtype=q.dtype, device=q.device) for tensor in (q, k, v))
    for rows in _documents(cu_seqlens, len(q)):
        tensors = [tensor[rows] for tensor in (do, q, k, v, o)]
        if backend == "reference":
            gradients = attention_document_backward(*tensors, lse[:, rows], scale=scale, window=window)
        else:
            _assert_cpu_flash(backend, window)
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(_heads_first(tensor) for tensor in tensors), lse[None, :, rows], 0.0, True, scale=scale
            )
            gradients = [_heads_last(gradient) for gradient in gradients]
        dq[rows], dk[rows], dv[rows] = gradients
    return dq, dk, dv


def _flash_window(window: int | None) -> dict[str, int]:
    """The kernel counts the keys to the left of the query, and -1 is all of them."""
    return {"window_size_left": -1 if window is None else window - 1, "window_size_right": 0}


def _assert_cpu_flash(backend: str, window: int | None) -> None:
    assert backend == "cpu_flash", f"unknown attention backend {backend!r}"
    assert window is None, "cpu_flash has no sliding window; select_attention_backend knows"


def _documents(cu_seqlens: Tensor, num_tokens: int) -> Iterator[slice]:
    """Rows of each document that has any: the CPU kernel divides by a document's length."""
    bounds = cu_seqlens.tolist()
    assert bounds[0] == 0, f"cu_seqlens starts at {bounds[0]}"
    assert bounds[-1] == num_tokens, f"cu_seqlens ends at {bounds[-1]}, there are {num_tokens} tokens"
    return (slice(start, stop) for start, stop in pairwise(bounds) if stop > start)


def _dense_heads(x: Tensor) -> Tensor:
    """The kernels take any strides but the last: flash refuses, the CPU's reads the wrong numbers."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _zero_or_nan(x: Tensor) -> Tensor:
    """``[T, heads, D]`` -> ``[T, heads]``: 0, or NaN where a number is not finite."""
    return x.sum(-1, dtype=compute_dtype(x.dtype)).mul_(0)


def _heads_first(x: Tensor) -> Tensor:
    """``[L, heads, D]`` -> ``[1, heads, L, D]``."""
    return x.transpose(0, 1)[None]


def _heads_last(x: Tensor) -> Tensor:
    """``[1, heads, L, D]`` -> ``[L, heads, D]``."""
    return x[0].transpose(0, 1)


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
