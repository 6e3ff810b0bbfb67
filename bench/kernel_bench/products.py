"""The losses over the output head, matrix products with row-wise work between, and who competes in them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from kernel_bench.elementwise import plain_kl
from kernel_bench.op import Call, Op, Setting, direct, kind, leaf, liger
from torch import Tensor
from torch.nn import functional as F

import llama_pro_kernels as kernels

__all__ = ["product_ops"]


def product_ops(s: Setting) -> Iterator[Op]:
    for trained in (False, True):
        yield _linear_cross_entropy(s, trained=trained)
    yield _linear_kl(s)


def _chunks(s: Setting) -> list[slice]:
    """The rows that ours takes at one time."""
    rows = kernels.rows_per_chunk(s.shape.V, s.dtype)
    return [slice(start, start + rows) for start in range(0, s.tokens, rows)]


def _linear_cross_entropy(s: Setting, *, trained: bool) -> Op:
    T, H, V = s.tokens, s.shape.H, s.shape.V

    def ours(*inputs: Tensor) -> Call:
        scale = torch.full((), 1 / T, device=s.device)
        return direct(kernels.linear_cross_entropy_forward, scale, need_dx=True, need_dweight=trained)(*inputs)

    def eager(x: Tensor, weight: Tensor, labels: Tensor) -> Call:
        x, weight = leaf(x), leaf(weight, trained)

        def forward_and_backward() -> tuple[Tensor, ...]:
            loss = F.cross_entropy(F.linear(x, weight).float(), labels)
            return (loss.detach(), *torch.autograd.grad(loss, [x, weight] if trained else [x]))

        return forward_and_backward

    def by_liger(x: Tensor, weight: Tensor, labels: Tensor) -> Call:
        forward = liger("fused_linear_cross_entropy").fused_linear_cross_entropy_forward
        x, weight = leaf(x), leaf(weight, trained)  # it looks at what needs a gradient

        @torch.no_grad()
        def call() -> tuple[Tensor, ...]:
            loss, *_, dx, dweight, _ = forward(x, weight, labels)
            return loss, dx, dweight

        return call

    def bare(x: Tensor, weight: Tensor, labels: Tensor) -> Call:
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
        contestants={"ours": ours, "eager": eager, "liger": by_liger, "bare products": bare},
        results=2 + trained,
        unit="flops",
        work=(2 + trained) * 2 * T * H * V,  # logits, dx, dweight
    )


def _linear_kl(s: Setting) -> Op:
    T, H, V = s.tokens, s.shape.H, s.shape.V

    def eager(x_base: Tensor, x_now: Tensor, weight: Tensor) -> Call:
        return lambda: plain_kl(F.linear(x_base, weight), F.linear(x_now, weight))

    def bare(*states: Tensor) -> Call:
        *states, weight = states

        def products() -> None:
            for rows in _chunks(s):
                for x in states:
                    kernels.linear(x[rows], weight)

        return products

    return Op(
        name="linear_kl",
        inputs=lambda: [s.draw(T, H), s.draw(T, H), s.draw(V, H, scale=0.02)],
        contestants={"ours": direct(kernels.linear_kl), "eager": eager, "bare products": bare},
        unit="flops",
        work=2 * 2 * T * H * V,
    )
