"""The bodies of the attention backends: one pair (forward, backward) each, over packed documents.

All take and return what attention.py says, with dense last dimensions and without aliasing. ``lse`` is ``[N, T]`` with
every backend, which is what each of their kernels writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import (
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
)

from .attention_selection import deterministic_algorithms
from .reference import accumulation_dtype, attention_document_backward, attention_document_forward

__all__ = ["KERNELS", "Kernels"]


class Kernels(NamedTuple):
    """The two halves of one backend.

    Attributes:
        forward: ``(q, k, v, cu_seqlens, max_seqlen, scale, window) -> (o, lse)``.
        backward: ``(do, q, k, v, o, lse, cu_seqlens, max_seqlen, scale, window) -> (dq, dk, dv)``.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


# PyTorch's flash attention for CUDA. FlashAttention 3 replaces the kernels behind the same two ops.


def _activate(implementation: str | None) -> None:
    """Put ``implementation`` behind the flash ops; None is PyTorch's own.

    What is behind them holds for the process, and not for a backend's name: another backend, or the code of somebody
    else, may have changed it since the last call. The check is one look at a variable.
    """
    if current_flash_attention_impl() == implementation:
        return
    if implementation is None:
        restore_flash_attention_impl()
    else:
        activate_flash_attention_impl(implementation)


def _flash_window(window: int | None) -> dict[str, int]:
    """The kernels count the keys to the left of the query; without a window nothing is said."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def _at_least_two(max_seqlen: int) -> int:
    """An upper bound that is no 1: the kernel would take that for decoding, and an empty document for a sequence."""
    return max(max_seqlen, 2)


def _flash_forward(
    implementation: str | None, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _activate(implementation)
    longest = _at_least_two(max_seqlen)
    o, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, window is None, False,
        scale=scale, **_flash_window(window),
    )  # fmt: skip
    return o, lse


def _flash_backward(
    implementation: str | None, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _activate(implementation)
    # Without dropout the kernel reads neither the generator's state nor the tensor its signature calls unused.
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.empty(0, device=q.device)
    longest = _at_least_two(max_seqlen)
    return torch.ops.aten._flash_attention_backward(
        do, q, k, v, o, lse, cu_seqlens, cu_seqlens, longest, longest, 0.0, window is None,
        rng_state, unused, scale=scale, **_flash_window(window),
    )  # fmt: skip


# The package flash-attn, FlashAttention 2. Imported at the call: it is optional and loads a CUDA library.


def _package_options(scale: float, window: int | None) -> dict[str, Any]:
    return {
        "dropout_p": 0.0,
        "softmax_scale": scale,
        "causal": window is None,
        "window_size_left": -1 if window is None else window - 1,
        "window_size_right": 0,
        "softcap": 0.0,
        "alibi_slopes": None,
    }


def _package_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

    o, lse, *_ = _flash_attn_varlen_forward(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **_package_options(scale, window)
    )
    return o, lse


def _package_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    scale: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

    gradients = tuple(torch.empty(tensor.shape, dtype=q.dtype, device=q.device) for tensor in (q, k, v))
    _flash_attn_varlen_backward(
        do, q, k, v, o, lse, *gradients, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        **_package_options(scale, window), deterministic=deterministic_algorithms(),
    )  # fmt: skip
    return gradients


# The package flash-attn-4 (FlashAttention 4), without PyTorch between: what PyTorch 2.11 to 2.13 put in front of it
# lacks the window in backward or takes another number of results. It compiles a kernel at its first call.


def _flash_4_options(cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None) -> dict[str, Any]:
    return {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": max_seqlen,
        "max_seqlen_k": max_seqlen,
        "softmax_scale": scale,
        "causal": window is None,
        **_flash_window(window),
    }


def _flash_4_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd

    o, lse, *_ = _flash_attn_fwd(q, k, v, **_flash_4_options(cu_seqlens, max_seqlen, scale, window), return_lse=True)
    return o, lse


def _flash_4_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    scale: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    from flash_attn.cute.interface import _flash_attn_bwd

    options = _flash_4_options(cu_seqlens, max_seqlen, scale, window)
    return _flash_attn_bwd(q, k, v, o, do, lse, **options, deterministic=deterministic_algorithms())[:3]


# cuDNN, through PyTorch. Its graph for packed documents writes the gradients with the strides of q, k and v into dense
# tensors, and reads wrong numbers from rows that are not aligned to 16 bytes; so it gets contiguous copies.


def _cudnn_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    assert window is None, "cudnn has no sliding window; select_attention_backend knows"
    o, lse, *_ = torch.ops.aten._cudnn_attention_forward(
        query=q.contiguous(), key=k.contiguous(), value=v.contiguous(), attn_bias=None,
        cum_seq_q=cu_seqlens, cum_seq_k=cu_seqlens, max_q=max_seqlen, max_k=max_seqlen,
        compute_log_sumexp=True, dropout_p=0.0, is_causal=True, return_debug_mask=False, scale=scale,
    )  # fmt: skip
    return o, lse


def _cudnn_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    scale: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # Without dropout the generator's state is not read; it must be there all the same.
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    return torch.ops.aten._cudnn_attention_backward(
        grad_out=do.contiguous(), query=q.contiguous(), key=k.contiguous(), value=v.contiguous(), out=o.contiguous(),
        logsumexp=lse, philox_seed=seed, philox_offset=seed, attn_bias=None,
        cum_seq_q=cu_seqlens, cum_seq_k=cu_seqlens, max_q=max_seqlen, max_k=max_seqlen,
        dropout_p=0.0, is_causal=True, scale=scale,
    )  # fmt: skip


# One call a document: PyTorch's flash attention for the CPU, and the reference on any device.


def _documents(cu_seqlens: Tensor, num_tokens: int) -> Iterator[slice]:
    """Rows of each document that has any: the CPU kernel divides by a document's length."""
    bounds = cu_seqlens.tolist()
    assert bounds[0] == 0, f"cu_seqlens starts at {bounds[0]}"
    assert bounds[-1] == num_tokens, f"cu_seqlens ends at {bounds[-1]}, there are {num_tokens} tokens"
    return (slice(start, stop) for start, stop in pairwise(bounds) if stop > start)


def _each_forward(
    document: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor,
    max_seqlen: int, scale: float, window: int | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q.dtype), device=q.device)
    for rows in _documents(cu_seqlens, len(q)):
        o[rows], lse[:, rows] = document(q[rows], k[rows], v[rows], scale=scale, window=window)
    return o, lse


def _each_backward(
    document: Callable[..., tuple[Tensor, ...]], do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
    cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty(tensor.shape, dtype=q.dtype, device=q.device) for tensor in (q, k, v))
    for rows in _documents(cu_seqlens, len(q)):
        tensors = [tensor[rows] for tensor in (do, q, k, v, o)]
        dq[rows], dk[rows], dv[rows] = document(*tensors, lse[:, rows], scale=scale, window=window)
    return dq, dk, dv


def _cpu_document_forward(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    assert window is None, "cpu_flash has no sliding window; select_attention_backend knows"
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_heads_first(tensor) for tensor in (q, k, v)), 0.0, True, scale=scale
    )
    return _heads_last(o), lse[0]


def _cpu_document_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *, scale: float, window: int | None
) -> tuple[Tensor, ...]:
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(_heads_first(tensor) for tensor in (do, q, k, v, o)), lse[None], 0.0, True, scale=scale
    )
    return tuple(_heads_last(gradient) for gradient in gradients)


def _cpu_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    o, lse = _each_forward(_cpu_document_forward, q, k, v, cu_seqlens, max_seqlen, scale, window)
    # The kernel takes a row of scores that are all NaN for a masked one and returns zeros (pytorch issue 141128).
    # A query sees its own key, so whatever fills its row with NaN is in one of the two.
    poison = _zero_or_nan(q).unflatten(1, (k.shape[1], -1)).add_(_zero_or_nan(k)[..., None]).flatten(1)
    o.add_(poison[..., None])
    lse.add_(poison.t())
    return o, lse


def _zero_or_nan(x: Tensor) -> Tensor:
    """``[T, heads, D]`` -> ``[T, heads]``: 0, or NaN where a number is not finite."""
    return x.sum(-1, dtype=accumulation_dtype(x.dtype)).mul_(0)


def _heads_first(x: Tensor) -> Tensor:
    """``[L, heads, D]`` -> ``[1, heads, L, D]``."""
    return x.transpose(0, 1)[None]


def _heads_last(x: Tensor) -> Tensor:
    """``[1, heads, L, D]`` -> ``[L, heads, D]``."""
    return x[0].transpose(0, 1)


KERNELS = {
    "flash": Kernels(partial(_flash_forward, None), partial(_flash_backward, None)),
    "flash_3": Kernels(partial(_flash_forward, "FA3"), partial(_flash_backward, "FA3")),
    "flash_4": Kernels(_flash_4_forward, _flash_4_backward),
    "flash_attn": Kernels(_package_forward, _package_backward),
    "cudnn": Kernels(_cudnn_forward, _cudnn_backward),
    "cpu_flash": Kernels(_cpu_forward, partial(_each_backward, _cpu_document_backward)),
    "reference": Kernels(
        partial(_each_forward, attention_document_forward), partial(_each_backward, attention_document_backward)
    ),
}
