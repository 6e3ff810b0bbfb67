"""Rotary position embedding, alone and with the norms of q and k, and who competes in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from kernel_bench.op import EPS, Call, Op, Setting, backward_of, heads_first, kind, leaf, liger, norm_weight
from torch import Tensor
from torch.nn import functional as F

__all__ = ["qk_norm_rotary_ops", "rotary_ops", "tables"]


def plain_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``[1, heads, T, D]`` by tables ``[1, 1, T, D]``, as Hugging Face's Llama does it."""

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return turned(q), turned(k)


def tables(s: Setting) -> list[Tensor]:
    """cos and sin ``[sequence, D/2]`` fp32, and the tokens' positions."""
    half = s.shape.D // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=s.device) / half)
    angles = torch.arange(s.sequence, device=s.device)[:, None] * frequency
    return [angles.cos(), angles.sin(), torch.arange(s.tokens, device=s.device) % s.sequence]


def _for_every_token(s: Setting, cos: Tensor, sin: Tensor, positions: Tensor) -> list[Tensor]:
    """``[1, T, D]`` in the activations' dtype."""
    return [torch.cat((table, table), dim=-1)[positions].to(s.dtype)[None] for table in (cos, sin)]


def _rotation_bytes(s: Setting, streams: int, heads: int, fp32: int = 0) -> int:
    """Of so many streams of heads; the tables once; positions; and of other numbers in fp32."""
    return s.bytes_of((streams, s.tokens, heads, s.shape.D), fp32=s.sequence * s.shape.D + fp32, int64=s.tokens)


def rotary_ops(s: Setting, kernels: Any) -> Iterator[Op]:
    T, N, K, D = s.tokens, s.shape.N, s.shape.K, s.shape.D

    def apart(qkv: Tensor) -> list[Tensor]:
        """q and k ``[1, heads, T, D]``, each contiguous by tokens as its own projection would leave it."""
        return [heads_first(x.contiguous()) for x in qkv.view(T, -1, D).split([N, K, K], dim=1)[:2]]

    def tokens_first(heads: tuple[Tensor, ...]) -> list[Tensor]:
        return [x[0].transpose(0, 1) for x in heads[:2]]

    def q_and_k(packed: Tensor) -> tuple[Tensor, ...]:
        return packed.view(T, -1, D)[:, : N + K].split([N, K], dim=1)

    def ours(qkv: Tensor, *tables: Tensor) -> Call:
        return lambda: q_and_k(kernels.rotary_forward(qkv, *tables, N, K, D))

    def ours_in_place(qkv: Tensor, *tables: Tensor) -> Call:
        return lambda: (kernels.rotary_forward_(qkv, *tables, N, K, D), *q_and_k(qkv))[1:]

    def eager(qkv: Tensor, *tables: Tensor) -> Call:
        heads, cos_sin = apart(qkv), [table[:, None] for table in _for_every_token(s, *tables)]
        return lambda: tokens_first(plain_rotary(*heads, *cos_sin))

    def by_liger(qkv: Tensor, *tables: Tensor) -> Call:
        forward, heads, cos_sin = liger("rope").rope_forward, apart(qkv), _for_every_token(s, *tables)
        return lambda: tokens_first(forward(*heads, *cos_sin))  # over q and k: a rotation more each time

    forward = {
        "inputs": lambda: [s.draw(T, (N + 2 * K) * D), *tables(s)],
        "results": 2,
        "work": _rotation_bytes(s, 2, N + K),
    }
    rivals = {"eager": eager, "liger": by_liger}
    yield Op(name="rotary forward", contestants={"ours": ours, **rivals}, **forward)
    yield Op(name="rotary forward in place", contestants={"ours": ours_in_place, **rivals}, **forward)

    def ours_backward(dq: Tensor, dk: Tensor, dv: Tensor, *tables: Tensor) -> Call:
        return lambda: q_and_k(kernels.rotary_backward(dq, dk, dv, *tables))

    def by_autograd(dq: Tensor, dk: Tensor, dv: Tensor, *tables: Tensor) -> Call:
        gradients = [heads_first(dq), heads_first(dk)]
        # A rotation keeps nothing of its input, so any numbers will do.
        leaves = [leaf(x) for x in gradients]
        outputs = plain_rotary(*leaves, *(table[:, None] for table in _for_every_token(s, *tables)))
        backward = backward_of(outputs, leaves, gradients)
        return lambda: tokens_first(backward())

    def liger_backward(dq: Tensor, dk: Tensor, dv: Tensor, *tables: Tensor) -> Call:
        backward, cos_sin = liger("rope").rope_backward, _for_every_token(s, *tables)
        gradients = [heads_first(dq), heads_first(dk)]
        return lambda: tokens_first(backward(*gradients, *cos_sin))  # over dq and dk

    yield Op(
        name="rotary backward",
        inputs=lambda: [s.draw(T, N, D), s.draw(T, K, D), s.draw(T, K, D), *tables(s)],
        contestants={"ours": ours_backward, "eager": by_autograd, "liger": liger_backward},
        results=2,
        work=_rotation_bytes(s, 2, N + 2 * K),
        rivals_work=_rotation_bytes(s, 2, N + K),  # only ours brings dv back beside them
    )


# The same with a norm on each head of q and k before it


def plain_qk_norm_rotary(
    s: Setting, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, *tables: Tensor
) -> tuple[Tensor, ...]:
    """q ``[T, N, D]`` and k ``[T, K, D]``, normed, then rotated."""
    N, K, D = s.shape.N, s.shape.K, s.shape.D
    q, k, _ = qkv.view(s.tokens, -1, D).split([N, K, K], dim=1)
    normed = [heads_first(F.rms_norm(x, (D,), weight, EPS)) for x, weight in ((q, q_weight), (k, k_weight))]
    cos_sin = [table[:, None] for table in _for_every_token(s, *tables)]
    return tuple(x[0].transpose(0, 1) for x in plain_rotary(*normed, *cos_sin))


def qk_norm_rotary_ops(s: Setting, kernels: Any) -> Iterator[Op]:
    if not s.shape.qk_norm:
        return
    T, N, K, D = s.tokens, s.shape.N, s.shape.K, s.shape.D
    packed = (T, (N + 2 * K) * D)

    def ours(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, *tables: Tensor) -> Call:
        def call() -> tuple[Tensor, ...]:
            turned = kernels.qk_norm_rotary_forward(qkv, q_weight, k_weight, EPS, *tables, N, K, D)
            return turned.split([N, K], dim=1)

        return call

    yield Op(
        name="qk_norm_rotary forward",
        inputs=lambda: [s.draw(*packed), norm_weight(s, D), norm_weight(s, D), *tables(s)],
        contestants={"ours": ours, "eager": lambda *inputs: lambda: plain_qk_norm_rotary(s, *inputs)},
        results=2,
        work=_rotation_bytes(s, 2, N + K) + s.bytes_of((2, D)),
    )
    for trained in (False, True):
        yield _qk_norm_rotary_backward(s, kernels, packed, trained=trained)


def _qk_norm_rotary_backward(s: Setting, kernels: Any, packed: tuple[int, int], *, trained: bool) -> Op:
    T, N, K, D = s.tokens, s.shape.N, s.shape.K, s.shape.D

    def ours(dq: Tensor, dk: Tensor, dv: Tensor, *inputs: Tensor) -> Call:
        qkv, q_weight, k_weight, *tables = inputs

        def call() -> tuple[Tensor | None, ...]:
            dqkv, dweights = kernels.qk_norm_rotary_backward(
                dq, dk, dv, qkv, q_weight, k_weight, EPS, *tables, need_dweight=trained
            )
            return (dqkv, *(dweights if trained else ()))

        return call

    def by_autograd(dq: Tensor, dk: Tensor, dv: Tensor, *inputs: Tensor) -> Call:
        qkv, *weights, cos, sin, positions = inputs
        leaves = [leaf(qkv), *(leaf(weight.to(s.dtype), trained) for weight in weights)]
        v = leaves[0].view(T, -1, D)[:, N + K :]
        outputs = (*plain_qk_norm_rotary(s, *leaves, cos, sin, positions), v)
        return backward_of(outputs, leaves if trained else leaves[:1], [dq, dk, dv])

    return Op(
        name=f"qk_norm_rotary backward {kind(trained)}",
        inputs=lambda: [
            s.draw(T, N, D), s.draw(T, K, D), s.draw(T, K, D), s.draw(*packed),
            norm_weight(s, D, trained), norm_weight(s, D, trained), *tables(s),
        ],
        contestants={"ours": ours, "eager": by_autograd},
        results=1 + 2 * trained,
        # of q and k the gradient, the raw heads and their gradient; of v the gradient there and here; weights
        work=_rotation_bytes(s, 3, N + K, fp32=4 * D * trained)
        + s.bytes_of((2, T, K, D), *([] if trained else [(2, D)])),
    )  # fmt: skip
