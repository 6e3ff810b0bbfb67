"""Gradients that are written in eight bits, beside the same kernel and a cast of its own behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from kernel_bench.op import EPS, Op, Setting, norm_weight
from kernel_bench.rotations import tables
from torch import Tensor

__all__ = ["eight_bits_ops"]


def eight_bits_ops(s: Setting, kernels: Any) -> Iterator[Op]:
    """``apart`` reads and writes the gradient once more. Codes may differ by a step; the tests say by how much."""
    T, H, I, N, K, D = s.tokens, s.shape.H, s.shape.I, s.shape.N, s.shape.K, s.shape.D
    packed, heads = (N + 2 * K) * D, lambda: [s.draw(T, n, D) for n in (N, K, K)]

    def op(
        name: str, inputs: Callable[[], list[Any]], plain: Callable[..., Tensor], width: int, read: int, more: int = 0
    ) -> Op:
        fused = getattr(kernels, f"{name}_e4m3")

        def apart(*inputs: Tensor) -> Callable[[], Any]:
            return lambda: kernels.quantize_e4m3(plain(*inputs))

        return Op(
            name=f"{name} e4m3",
            inputs=inputs,
            contestants={"ours": lambda *inputs: lambda: fused(*inputs), "apart": apart},
            results=0,
            work=read + T * (width + 4) + more,  # codes and a scale a token
            targets=(89, 90, 100),  # older ones have no e4m3
        )

    yield Op(
        name="quantize_e4m3",
        inputs=lambda: [s.draw(T, H)],
        contestants={"ours": lambda x: lambda: kernels.quantize_e4m3(x)},
        results=0,
        work=s.bytes_of((T, H)) + T * (H + 4),
        targets=(89, 90, 100),
    )
    yield op(
        "rms_norm_backward",
        lambda: [s.draw(T, H), s.draw(T, H), norm_weight(s, H), s.draw(T, dtype=torch.float32)],
        lambda *inputs: kernels.rms_norm_backward(*inputs, need_dweight=False)[0],
        H,
        s.bytes_of((2, T, H), (H,), fp32=T),
        more=s.bytes_of((T, H)),  # dx itself too
    )
    yield op(
        "swiglu_backward",
        lambda: [s.draw(T, I), s.draw(T, 2 * I)],
        lambda *inputs: kernels.swiglu_backward(*inputs)[0],
        2 * I,
        s.bytes_of((3, T, I)),
    )
    tables_of = {"fp32": s.sequence * D, "int64": T}
    yield op(
        "rotary_backward",
        lambda: [*heads(), *tables(s)],
        kernels.rotary_backward,
        packed,
        s.bytes_of((T, packed), **tables_of),
    )
    if s.shape.qk_norm:
        yield op(
            "qk_norm_rotary_backward",
            lambda: [*heads(), s.draw(T, packed), norm_weight(s, D), norm_weight(s, D), EPS, *tables(s)],
            lambda *inputs: kernels.qk_norm_rotary_backward(*inputs, need_dweight=False)[0],
            packed,
            s.bytes_of((T, packed), (T, (N + K) * D), (2, D), **tables_of),
        )
