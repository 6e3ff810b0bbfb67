"""The ops with matrix products in them, and who competes: the losses over the output head, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import current_flash_attention_impl, restore_flash_attention_impl

import llama_pro_kernels as kernels
from kernel_bench.elementwise import plain_kl
from kernel_bench.op import (
    Op,
    Setting,
    Setup,
    backward_of,
    direct,
    heads_first,
    kind,
    leaf,
    liger,
    plain,
    plain_function,
)
from llama_pro_kernels.attention_selection import BACKENDS

__all__ = ["product_ops"]


def product_ops(s: Setting) -> Iterator[Op]:
    for trained in (False, True):
        yield _linear_cross_entropy(s, trained=trained)
    yield _linear_kl(s)
    for layout, lengths in layouts(s.tokens, s.sequence).items():
        yield from _attention(s, layout, lengths)


# The losses: products with row-wise work between


def plain_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), labels)


def plain_linear_kl(x_base: Tensor, x_now: Tensor, weight: Tensor) -> Tensor:
    return plain_kl(F.linear(x_base, weight), F.linear(x_now, weight))


def _chunks(s: Setting) -> list[slice]:
    """The rows that ours takes at one time."""
    rows = kernels.rows_per_chunk(s.shape.V, s.dtype)
    return [slice(start, start + rows) for start in range(0, s.tokens, rows)]


def _linear_cross_entropy(s: Setting, *, trained: bool) -> Op:
    T, H, V = s.tokens, s.shape.H, s.shape.V

    def ours(x: Tensor, weight: Tensor, labels: Tensor) -> Callable[[], Any]:
        scale = torch.full((), 1 / T, device=s.device)
        forward = kernels.linear_cross_entropy_forward
        return lambda: forward(x, weight, labels, scale, need_dx=True, need_dweight=trained)

    def by_autograd(wrap: Callable, x: Tensor, weight: Tensor, labels: Tensor) -> Callable[[], Any]:
        x, weight, function = leaf(x), leaf(weight, trained), wrap(plain_loss)

        def forward_and_backward() -> tuple[Tensor, ...]:
            loss = function(x, weight, labels)
            return (loss.detach(), *torch.autograd.grad(loss, [x, weight] if trained else [x]))

        return forward_and_backward

    def by_liger(x: Tensor, weight: Tensor, labels: Tensor) -> Callable[[], Any]:
        forward = liger("fused_linear_cross_entropy").fused_linear_cross_entropy_forward
        x, weight = leaf(x), leaf(weight, trained)  # it looks at what needs a gradient

        @torch.no_grad()
        def call() -> tuple[Tensor, ...]:
            loss, *_, dx, dweight, _ = forward(x, weight, labels)
            return loss, dx, dweight

        return call

    def bare(x: Tensor, weight: Tensor, labels: Tensor) -> Callable[[], None]:
        def products() -> None:
            dx = torch.empty_like(x)
            for rows in _chunks(s):
                logits = kernels.linear(x[rows], weight)
                kernels.linear_dx(logits, weight, out=dx[rows])
                if trained:
                    kernels.linear_dw(logits, x[rows])

        return products

    return Op(
        name=f"linear_cross_entropy {kind(trained)}",
        inputs=lambda: [s.draw(T, H), s.draw(V, H, scale=0.02), s.labels()],
        contestants={"ours": ours, **plain(by_autograd), "liger": by_liger, "bare products": bare},
        results=2 + trained,
        unit="flops",
        work=(2 + trained) * 2 * T * H * V,  # logits, dx, dweight
    )


def _linear_kl(s: Setting) -> Op:
    T, H, V = s.tokens, s.shape.H, s.shape.V

    def inputs() -> list[Tensor]:
        x_base = s.draw(T, H)
        return [x_base, s.draw(T, H, scale=0.3).add_(x_base), s.draw(V, H, scale=0.02)]

    def bare(x_base: Tensor, x_now: Tensor, weight: Tensor) -> Callable[[], None]:
        def products() -> None:
            for rows in _chunks(s):
                for x in (x_base, x_now):
                    kernels.linear(x[rows], weight)

        return products

    return Op(
        name="linear_kl",
        inputs=inputs,
        contestants={"ours": direct(kernels.linear_kl), **plain_function(plain_linear_kl), "bare products": bare},
        unit="flops",
        work=2 * 2 * T * H * V,
    )


# Attention within packed documents


def layouts(tokens: int, sequence: int) -> dict[str, list[int]]:
    """Document lengths: whole rows, and rows of five documents that halve in length and divide by nothing."""
    ragged = [sequence // 2 - 1, sequence // 4 + 1, sequence // 8 - 1, sequence // 16 + 1]
    ragged.append(sequence - sum(ragged))
    rows = tokens // sequence
    return {"full": [sequence] * rows, "ragged": ragged * rows}


def _backends(s: Setting, setup: Callable[..., Callable[[], Any]]) -> dict[str, Setup]:
    """Ours by the backend that a run would get, then by every other one that can serve here."""
    select = partial(kernels.select_attention_backend, s.device, s.dtype, head_dim=s.shape.D)
    auto, found = select(), {}
    for name in BACKENDS:
        try:
            chosen = select(requested=name)
        except ValueError:
            continue
        found["ours" if name == auto else f"backend {name}"] = partial(setup, chosen)
    return {"ours": found.pop("ours"), **found}


def _batches(lengths: list[int], x: Tensor) -> list[Tensor]:
    """Views ``[B, heads, L, D]`` of ``[T, heads, D]``: one where all documents are of one length, else one for each."""
    if len(set(lengths)) == 1:
        return [x.unflatten(0, (len(lengths), -1)).transpose(1, 2)]
    return [heads_first(document) for document in x.split(lengths)]


def _attention(s: Setting, layout: str, lengths: list[int]) -> Iterator[Op]:
    T, N, K, D = s.tokens, s.shape.N, s.shape.K, s.shape.D
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(s.device)
    documents, options = (bounds, max(lengths)), {"scale": D**-0.5}
    batches = 1 if layout == "full" else len(lengths)

    def sdpa() -> Callable[..., Tensor]:
        if current_flash_attention_impl() is not None:  # a backend before it left another one behind PyTorch's
            restore_flash_attention_impl()
        return partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=N != K)

    def ours(backend: str, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
        forward = kernels.attention_forward
        return lambda: _batches(lengths, forward(q, k, v, *documents, **options, backend=backend)[0])

    def eager(*qkv: Tensor) -> Callable[[], Any]:
        attention = sdpa()
        each = list(zip(*(_batches(lengths, x) for x in qkv), strict=True))
        return lambda: [attention(*document) for document in each]

    def ours_backward(backend: str, do: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Any]:
        o, lse = kernels.attention_forward(q, k, v, *documents, **options, backend=backend)

        def call() -> list[Tensor]:
            gradients = kernels.attention_backward(do, q, k, v, o, lse, *documents, **options, backend=backend)
            return [batch for gradient in gradients for batch in _batches(lengths, gradient)]

        return call

    def eager_backward(do: Tensor, *qkv: Tensor) -> Callable[[], Any]:
        attention = sdpa()
        leaves = [[leaf(batch) for batch in _batches(lengths, x)] for x in qkv]
        outputs = [attention(*document) for document in zip(*leaves, strict=True)]
        return backward_of(outputs, [x for each in leaves for x in each], _batches(lengths, do))

    def qkv() -> list[Tensor]:
        return [s.draw(T, heads, D) for heads in (N, K, K)]

    yield Op(
        name=f"attention forward {layout}",
        inputs=qkv,
        contestants=_backends(s, ours) | {"eager": eager},
        results=batches,
        unit="flops",
        work=2 * 2 * pairs * N * D,
    )
    yield Op(
        name=f"attention backward {layout}",
        inputs=lambda: [s.draw(T, N, D), *qkv()],
        contestants=_backends(s, ours_backward) | {"eager": eager_backward},
        results=3 * batches,
        unit="flops",
        work=5 * 2 * pairs * N * D,
    )
