"""The memory-bound ops and who competes in them: RMSNorm, SwiGLU, rotary position embedding."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import llama_pro_kernels as kernels
from kernel_bench.ops import (
    Inputs,
    Op,
    Run,
    Setting,
    Tensors,
    backward_of,
    heads_first,
    kind,
    leaves_of,
    liger_ops,
    needs_dw,
    plain_contestants,
)  # fmt: skip

__all__ = ["elementwise_ops"]

EPS = 1e-5
ROPE_BASE = 10_000.0


def elementwise_ops(setting: Setting) -> Iterator[Op]:
    for add in (False, True):
        yield _norm_forward(setting, add=add)
    for trained in (False, True):
        for add in (False, True):
            yield _norm_backward(setting, add=add, trained=trained)
    yield _swiglu_forward(setting)
    for trained in (False, True):
        yield _swiglu_backward(setting, trained=trained)
    yield _rotary_forward(setting)
    yield _rotary_backward(setting)


# RMSNorm


def plain_rms_norm(x: Tensor, weight: Tensor) -> tuple[Tensor]:
    return (F.rms_norm(x, weight.shape, weight, EPS),)


def plain_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    s = x + residual
    return F.rms_norm(s, weight.shape, weight, EPS), s


def _norm_inputs(s: Setting, streams: Sequence[str]) -> Inputs:
    inputs = {name: s.draw(s.tokens, s.shape.hidden) for name in streams}
    return inputs | {"weight": s.draw(s.shape.hidden, scale=0.1).add_(1)}


def _norm_forward(s: Setting, *, add: bool) -> Op:
    addends = ("x", "residual") if add else ("x",)
    results = 1 + add  # y, and the sum

    def of(inputs: Inputs, function: Callable, *more: Any, **options: Any) -> Run:
        arguments = [*(inputs[name] for name in addends), inputs["weight"], *more]
        return Run(call=lambda: function(*arguments, **options), result=lambda out: out[:results])

    def liger(inputs: Inputs) -> Run:
        if add:
            return of(inputs, liger_ops("fused_add_rms_norm").fused_add_rms_norm_forward, EPS, 0.0, "llama")
        return of(inputs, liger_ops("rms_norm").rms_norm_forward, EPS, 0.0, "llama", None)

    def quack(inputs: Inputs) -> Run:
        function, residual = importlib.import_module("quack.rmsnorm").rmsnorm_fwd, inputs.get("residual")
        return Run(
            call=lambda: function(inputs["x"], inputs["weight"], residual=residual, eps=EPS, store_rstd=True),
            result=lambda out: out[:results],
        )

    T, H = s.tokens, s.shape.hidden
    streams = 2 * len(addends)
    return Op(
        name="add_rms_norm forward" if add else "rms_norm forward",
        inputs=lambda: _norm_inputs(s, addends),
        contestants={
            "ours": lambda inputs: of(
                inputs, kernels.add_rms_norm_forward if add else kernels.rms_norm_forward, EPS
            ),
            **plain_contestants(lambda inputs, wrap: of(inputs, wrap(plain_add_rms_norm if add else plain_rms_norm))),
            "liger": liger,
            "quack": quack,
        },
        unit="bytes",
        work=s.bytes_of((streams, T, H), (H,), fp32=T),
        count=("x, residual read, y, sum written: 4" if add else "x read, y written: 2") + " x [T, H]; weight; rstd",
        yardstick="copy",
    )  # fmt: skip


def _norm_backward(s: Setting, *, add: bool, trained: bool) -> Op:
    addends = ("x", "residual") if add else ("x",)
    given = ("dy", "dresidual") if add else ("dy",)

    def ours(inputs: Inputs) -> Run:
        weight = inputs["weight"].float() if trained else inputs["weight"]
        if add:
            _, x, rstd = kernels.add_rms_norm_forward(inputs["x"], inputs["residual"], weight, EPS)
        else:
            x, (_, rstd) = inputs["x"], kernels.rms_norm_forward(inputs["x"], weight, EPS)
        dy, dresidual = inputs["dy"], inputs.get("dresidual")
        return Run(
            call=lambda: kernels.rms_norm_backward(dy, x, weight, rstd, dresidual=dresidual, need_dweight=trained),
            result=lambda out: out[: 1 + trained],
        )

    def plain(inputs: Inputs, wrap: Callable) -> Run:
        leaves = leaves_of(*(inputs[name] for name in addends))
        weight = inputs["weight"].detach().requires_grad_(trained)
        outputs = wrap(plain_add_rms_norm if add else plain_rms_norm)(*leaves, weight)
        wanted = [*leaves, weight] if trained else leaves
        return Run(
            call=backward_of(outputs, wanted, [inputs[name] for name in given]),
            # Both addends have the same gradient.
            result=lambda out: (out[0], *out[len(addends) :]),
        )

    def liger(inputs: Inputs) -> Run:
        weight, dy = inputs["weight"], inputs["dy"]
        if add:
            module = liger_ops("fused_add_rms_norm")
            _, x, rstd, *launch, mode = module.fused_add_rms_norm_forward(
                inputs["x"], inputs["residual"], weight, EPS, 0.0, "llama"
            )
            backward = module.fused_add_rms_norm_backward
            options = needs_dw(backward, trained)
            return Run(
                call=lambda: backward(dy, inputs["dresidual"], x, weight, rstd, 0.0, mode, *launch, False, **options),
                result=lambda out: (out[0], out[2])[: 1 + trained],
            )
        module = liger_ops("rms_norm")
        _, x, rstd, *launch, mode = module.rms_norm_forward(inputs["x"], weight, EPS, 0.0, "llama", None)
        backward, dy = module.rms_norm_backward, dy.clone()
        options = needs_dw(backward, trained)
        return Run(
            call=lambda: backward(dy, x, weight, rstd, 0.0, mode, *launch, True, None, **options),
            result=lambda out: out[: 1 + trained],
            overwrites=(dy,),
            note="in place of dy, as by default",
        )

    def quack(inputs: Inputs) -> Run:
        module, weight = importlib.import_module("quack.rmsnorm"), inputs["weight"]
        _, x, rstd = module.rmsnorm_fwd(
            inputs["x"], weight, residual=inputs.get("residual"), eps=EPS, store_rstd=True
        )  # fmt: skip
        options = {"dresidual_out": inputs["dresidual"], "has_residual": True} if add else {}
        return Run(
            call=lambda: module.rmsnorm_bwd(x, weight, inputs["dy"], rstd, **options),
            result=lambda out: out[: 1 + trained],
        )

    T, H = s.tokens, s.shape.hidden
    count = "dy, x, dresidual read, dx written: 4 x [T, H]" if add else "dy, x read, dx written: 3 x [T, H]"
    return Op(
        name=f"{'add_' if add else ''}rms_norm backward {kind(trained)}",
        inputs=lambda: _norm_inputs(s, (*addends, *given)),
        contestants={"ours": ours, **plain_contestants(plain), "liger": liger, "quack": quack},
        unit="bytes",
        work=s.bytes_of((3 + add, T, H), *([] if trained else [(H,)]), fp32=T + 2 * H * trained),
        count=f"{count}; rstd; weight" + (", dweight in fp32" if trained else ""),
        yardstick="copy",
    )


# SwiGLU


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _halves(gate_up: Tensor) -> list[Tensor]:
    """Gate and up apart, copied."""
    return [half.clone(memory_format=torch.contiguous_format) for half in gate_up.chunk(2, dim=-1)]


def _swiglu_forward(s: Setting) -> Op:
    def plain(inputs: Inputs, wrap: Callable) -> Run:
        function, halves = wrap(plain_swiglu), _halves(inputs["gate_up"])
        return Run(call=lambda: function(*halves), result=lambda out: (out,))

    def liger(inputs: Inputs) -> Run:
        module = liger_ops("swiglu")
        if hasattr(module, "swiglu_fused_gate_up_forward"):
            packed = module.swiglu_fused_gate_up_forward
            return Run(call=lambda: packed(inputs["gate_up"]), result=lambda out: out[1:])
        halves = _halves(inputs["gate_up"])
        return Run(call=lambda: module.swiglu_forward(*halves), result=lambda out: out[2:])

    T, I = s.tokens, s.shape.intermediate
    return Op(
        name="swiglu forward",
        inputs=lambda: {"gate_up": s.draw(T, 2 * I)},
        contestants={
            "ours": lambda inputs: Run(
                call=lambda: kernels.swiglu_forward(inputs["gate_up"]), result=lambda out: (out,)
            ),
            **plain_contestants(plain),
            "liger": liger,
        },
        unit="bytes",
        work=s.bytes_of((3, T, I)),
        count="gate, up read, product written: 3 x [T, I]",
        yardstick="copy",
    )  # fmt: skip


def _swiglu_backward(s: Setting, *, trained: bool) -> Op:
    def ours(inputs: Inputs) -> Run:
        gate_up = inputs["gate_up"].clone()
        return Run(
            call=lambda: kernels.swiglu_backward_(inputs["dy"], gate_up, need_product=trained),
            result=lambda out: out[: 1 + trained],
            overwrites=(gate_up,),
            note="in place of gate_up",
        )

    def plain(inputs: Inputs, wrap: Callable) -> Run:
        function, halves = wrap(plain_swiglu), _halves(inputs["gate_up"])
        leaves = leaves_of(*halves)
        backward = backward_of([function(*leaves)], leaves, [inputs["dy"]])
        return Run(
            call=(lambda: (*backward(), function(*halves))) if trained else backward,
            result=lambda out: (torch.cat(out[:2], dim=-1), *out[2:]),
        )

    def liger(inputs: Inputs) -> Run:
        module = liger_ops("swiglu")
        return (
            liger_packed(module, inputs) if hasattr(module, "swiglu_fused_gate_up_backward") else apart(module, inputs)
        )

    def liger_packed(module: Any, inputs: Inputs) -> Run:
        gate_up = inputs["gate_up"].clone()

        def backward() -> Tensors:
            product = module.swiglu_fused_gate_up_forward(gate_up)[1:] if trained else ()
            return (module.swiglu_fused_gate_up_backward(gate_up, inputs["dy"], in_place=True), *product)

        return Run(call=backward, overwrites=(gate_up,), note="in place of gate_up")

    def apart(module: Any, inputs: Inputs) -> Run:
        halves = _halves(inputs["gate_up"])

        def backward() -> Tensors:
            product = module.swiglu_forward(*halves)[2:] if trained else ()
            return (*module.swiglu_backward(*halves, inputs["dy"]), *product)

        return Run(
            call=backward,
            result=lambda out: (torch.cat(out[:2], dim=-1), *out[2:]),
            overwrites=tuple(halves),
            note="in place of gate and up",
        )

    T, I = s.tokens, s.shape.intermediate
    return Op(
        name=f"swiglu backward {kind(trained)}",
        inputs=lambda: {"dy": s.draw(T, I), "gate_up": s.draw(T, 2 * I)},
        contestants={"ours": ours, **plain_contestants(plain), "liger": liger},
        unit="bytes",
        work=s.bytes_of((5 + trained, T, I)),
        count="dy, gate, up read, dgate, dup written: 5 x [T, I]" + ("; product written: 1" if trained else ""),
        yardstick="copy",
    )


# Rotary position embedding


def plain_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``[1, heads, T, D]`` by tables ``[1, 1, T, D]``, as Hugging Face's Llama does it."""

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return turned(q), turned(k)


def _rotary_tables(s: Setting) -> Tensors:
    """cos and sin ``[sequence, D/2]`` fp32, and the tokens' positions."""
    half = s.shape.head_dim // 2
    frequency = ROPE_BASE ** (-torch.arange(half, device=s.device) / half)
    angles = torch.arange(s.sequence, device=s.device)[:, None] * frequency
    return angles.cos(), angles.sin(), torch.arange(s.tokens, device=s.device) % s.sequence


def _plain_tables(s: Setting) -> list[Tensor]:
    """cos and sin of every token ``[1, T, D]`` in the activations' dtype."""
    cos, sin, positions = _rotary_tables(s)
    return [torch.cat((table, table), dim=-1)[positions].to(s.dtype)[None] for table in (cos, sin)]


def _tokens_first(x: Tensor) -> Tensor:
    return x[0].transpose(0, 1)


def _query_and_key(s: Setting, qkv: Tensor) -> list[Tensor]:
    """q and k ``[1, heads, T, D]`` apart, copied, each contiguous by tokens as its own projection would leave it."""
    heads = qkv.view(s.tokens, -1, s.shape.head_dim).split([s.shape.heads, s.shape.kv_heads, s.shape.kv_heads], dim=1)
    return [heads_first(x.clone(memory_format=torch.contiguous_format)) for x in heads[:2]]


def _rotary_work(s: Setting, heads: int) -> int:
    tables = 2 * s.sequence * (s.shape.head_dim // 2)
    return s.bytes_of((2, s.tokens, heads, s.shape.head_dim), fp32=tables, int64=s.tokens)


def _rotary_forward(s: Setting) -> Op:
    N, K, D = s.shape.heads, s.shape.kv_heads, s.shape.head_dim
    tables = _rotary_tables(s)

    def plain(inputs: Inputs, wrap: Callable) -> Run:
        function, heads = wrap(plain_rotary), _query_and_key(s, inputs["qkv"])
        cos_sin = [table[:, None] for table in _plain_tables(s)]
        return Run(call=lambda: function(*heads, *cos_sin), result=lambda out: tuple(map(_tokens_first, out)))

    def liger(inputs: Inputs) -> Run:
        function, heads, cos_sin = liger_ops("rope").rope_forward, _query_and_key(s, inputs["qkv"]), _plain_tables(s)
        return Run(
            call=lambda: function(*heads, *cos_sin),
            result=lambda out: tuple(map(_tokens_first, out[:2])),
            overwrites=tuple(heads),
            note="in place of q and k",
        )

    return Op(
        name="rotary forward",
        inputs=lambda: {"qkv": s.draw(s.tokens, (N + 2 * K) * D)},
        contestants={
            "ours": lambda inputs: Run(
                call=lambda: kernels.rotary_forward(inputs["qkv"], *tables, N, K, D), result=lambda out: out[:2]
            ),
            **plain_contestants(plain),
            "liger": liger,
        },
        unit="bytes",
        work=_rotary_work(s, N + K),
        count="q, k read and written: 2 x [T, N + K, D]; tables once; positions",
        yardstick="copy",
    )


def _rotary_backward(s: Setting) -> Op:
    N, K, D = s.shape.heads, s.shape.kv_heads, s.shape.head_dim
    tables = _rotary_tables(s)
    apart = {"work": _rotary_work(s, N + K), "note": "dv stays where it is"}

    def ours(inputs: Inputs) -> Run:
        return Run(
            call=lambda: kernels.rotary_backward(inputs["dq"], inputs["dk"], inputs["dv"], *tables),
            result=lambda out: out.view(s.tokens, -1, D)[:, : N + K].split([N, K], dim=1),
        )

    def plain(inputs: Inputs, wrap: Callable) -> Run:
        gradients = [heads_first(inputs[name]) for name in ("dq", "dk")]
        # A rotation keeps nothing of its input, so any numbers will do.
        leaves = leaves_of(*gradients)
        outputs = wrap(plain_rotary)(*leaves, *(table[:, None] for table in _plain_tables(s)))
        backward = backward_of(outputs, leaves, gradients)
        return Run(call=backward, result=lambda out: tuple(map(_tokens_first, out)), **apart)

    def liger(inputs: Inputs) -> Run:
        function, cos_sin = liger_ops("rope").rope_backward, _plain_tables(s)
        gradients = [heads_first(inputs[name].clone()) for name in ("dq", "dk")]
        return Run(
            call=lambda: function(*gradients, *cos_sin),
            result=lambda out: tuple(map(_tokens_first, out)),
            overwrites=tuple(gradients),
            **apart | {"note": "in place of dq and dk; dv stays where it is"},
        )

    return Op(
        name="rotary backward",
        inputs=lambda: {"dq": s.draw(s.tokens, N, D), "dk": s.draw(s.tokens, K, D), "dv": s.draw(s.tokens, K, D)},
        contestants={"ours": ours, **plain_contestants(plain), "liger": liger},
        unit="bytes",
        work=_rotary_work(s, N + 2 * K),
        count="dq, dk, dv read, dqkv written: 2 x [T, N + 2K, D]; tables once; positions",
        yardstick="copy",
    )
