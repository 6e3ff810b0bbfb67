"""Every kernel of a training step at the shapes of the models people expand; shared by what compiles and what times.

A case is one op of one model as the decoder calls it. The functions are those of the Triton bodies, so a case can be
run on a GPU, or recorded on meta tensors where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["MODELS", "Case", "ModelShape", "cases"]

bf16, fp32 = torch.bfloat16, torch.float32


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What decides a kernel's shapes; from the models' published config.json.

    Attributes:
        hidden, intermediate, heads, kv_heads, head_dim, vocab: sizes.
        qk_norm: whether q and k are normed per head.
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    qk_norm: bool = False


MODELS = {
    "llama-2-7b": ModelShape(
        hidden=4096, intermediate=11008, heads=32, kv_heads=32, head_dim=128, vocab=32000
    ),
    "llama-3-8b": ModelShape(
        hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256
    ),
    "llama-3-70b": ModelShape(
        hidden=8192, intermediate=28672, heads=64, kv_heads=8, head_dim=128, vocab=128256
    ),
    "qwen3-8b": ModelShape(
        hidden=4096, intermediate=12288, heads=32, kv_heads=8, head_dim=128, vocab=151936, qk_norm=True
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op of one model.

    Attributes:
        name: the op, and ``frozen`` or ``trained`` where that makes a difference.
        run: makes the tensors it needs with the functions of :mod:`torch` on the default device and calls the op.
    """

    name: str
    run: Callable[[], Any]


def cases(shape: ModelShape, tokens: int) -> Iterator[Case]:
    """The cases of one model over ``tokens`` tokens in bf16; a trained norm's weight is an fp32 master."""
    from llama_pro_kernels import triton_kernels as ops

    T, H, I, V = tokens, shape.hidden, shape.intermediate, shape.vocab
    N, K, D = shape.heads, shape.kv_heads, shape.head_dim

    def rows(width: int) -> torch.Tensor:
        return torch.empty(T, width, dtype=bf16)

    def per_token(dtype: torch.dtype = fp32) -> torch.Tensor:
        return torch.empty(T, dtype=dtype)

    def weight(width: int, trained: bool = False) -> torch.Tensor:
        return torch.empty(width, dtype=fp32 if trained else bf16)

    def tables() -> tuple[torch.Tensor, ...]:
        return torch.empty(T, D // 2), torch.empty(T, D // 2), per_token(torch.int64)

    def heads() -> list[torch.Tensor]:
        return [torch.empty(T, n, D, dtype=bf16) for n in (N, K, K)]

    yield Case(name="rms_norm forward", run=lambda: ops.rms_norm_forward(rows(H), weight(H), 1e-5))
    yield Case(
        name="add_rms_norm forward", run=lambda: ops.add_rms_norm_forward(rows(H), rows(H), weight(H), 1e-5)
    )  # fmt: skip
    for trained in (False, True):
        kind = "trained" if trained else "frozen"
        yield Case(
            name=f"rms_norm backward {kind}",
            run=lambda trained=trained: ops.rms_norm_backward(
                rows(H), rows(H), weight(H, trained), per_token(), need_dweight=trained
            ),
        )
        yield Case(
            name=f"add_rms_norm backward {kind}",
            run=lambda trained=trained: ops.rms_norm_backward(
                rows(H), rows(H), weight(H, trained), per_token(), dresidual=rows(H), need_dweight=trained
            ),
        )
        if shape.qk_norm:
            yield Case(
                name=f"qk_norm backward {kind}",
                run=lambda trained=trained: ops.rms_norm_backward(
                    torch.empty(T, N, D, dtype=bf16), rows((N + 2 * K) * D).view(T, -1, D)[:, :N],
                    weight(D, trained), torch.empty(T, N), need_dweight=trained,
                ),
            )  # fmt: skip
    if shape.qk_norm:
        yield Case(
            name="qk_norm forward",
            run=lambda: ops.rms_norm_forward(rows((N + 2 * K) * D).view(T, -1, D)[:, :N], weight(D), 1e-6),
        )
    for name, outputs in (("qkv", (N + 2 * K) * D), ("gate_up", 2 * I)):
        yield Case(
            name=f"linear_dscale {name}",
            run=lambda outputs=outputs: ops.linear_dscale(
                torch.empty(outputs, H, dtype=bf16), torch.empty(outputs, H), weight(H, trained=True)
            ),
        )
    yield Case(name="swiglu forward", run=lambda: ops.swiglu_forward(rows(2 * I)))
    yield Case(name="swiglu backward frozen", run=lambda: ops.swiglu_backward_(rows(I), rows(2 * I)))
    yield Case(
        name="swiglu backward trained", run=lambda: ops.swiglu_backward_(rows(I), rows(2 * I), need_product=True)
    )  # fmt: skip
    yield Case(name="rotary forward", run=lambda: ops.rotary_forward(rows((N + 2 * K) * D), *tables(), N, K, D))
    yield Case(
        name="rotary forward in place", run=lambda: ops.rotary_forward_(rows((N + 2 * K) * D), *tables(), N, K, D)
    )  # fmt: skip
    yield Case(name="rotary backward", run=lambda: ops.rotary_backward(*heads(), *tables()))
    for name, options in {
        "cross_entropy": {"need_dlogits": True},
        "cross_entropy evaluation": {"need_dlogits": False, "need_correct": True},
    }.items():
        yield Case(
            name=name,
            run=lambda options=options: ops.cross_entropy_(
                rows(V), per_token(torch.int64), torch.empty(()), ignore_index=-100, **options
            ),
        )
    yield Case(name="kl_divergence", run=lambda: ops.kl_divergence(rows(V), rows(V)))
