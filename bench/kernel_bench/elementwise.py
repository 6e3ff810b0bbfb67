"""The memory-bound ops, one Triton kernel each (a trained norm's backward two), and who competes in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from kernel_bench.eight_bits import eight_bits_ops
from kernel_bench.op import EPS, Call, Op, Setting, backward_of, direct, kind, leaf, liger, norm_weight
from kernel_bench.rotations import qk_norm_rotary_ops, rotary_ops
from torch import Tensor
from torch.nn import functional as F

from llama_pro_kernels import reference

__all__ = ["elementwise_ops"]


def elementwise_ops(s: Setting, kernels: Any) -> Iterator[Op]:
    """Every one of a model.

    Args:
        kernels: `llama_pro_kernels.triton_kernels`, or for a CPU `llama_pro_kernels.reference`: the same functions.
    """
    for ops in (_norms, _norm_weights, _swiglu, rotary_ops, qk_norm_rotary_ops, eight_bits_ops, _losses, _adamw):
        yield from ops(s, kernels)


# RMSNorm, alone and with the residual sum


def plain_norm(*inputs: Tensor) -> tuple[Tensor, ...]:
    """x and weight -> y; or x, residual and weight -> y and the sum."""
    *addends, weight = inputs
    s = sum(addends[1:], addends[0])
    return F.rms_norm(s, weight.shape, weight, EPS), s


def _rstd(x: Tensor) -> Tensor:
    return (x.float().square().mean(-1) + EPS).rsqrt()


def _norms(s: Setting, kernels: Any) -> Iterator[Op]:
    for add in (False, True):
        yield _norm_forward(s, kernels, add=add)
        for trained in (False, True):
            yield _norm_backward(s, kernels, add=add, trained=trained)


def _norm_forward(s: Setting, kernels: Any, *, add: bool) -> Op:
    size = (s.tokens, s.shape.H)

    def by_liger(*inputs: Tensor) -> Call:
        if add:
            return direct(liger("fused_add_rms_norm").fused_add_rms_norm_forward, EPS, 0.0, "llama")(*inputs)
        return direct(liger("rms_norm").rms_norm_forward, EPS, 0.0, "llama", None)(*inputs)

    return Op(
        name=f"{'add_' * add}rms_norm forward",
        inputs=lambda: [*(s.draw(*size) for _ in range(1 + add)), norm_weight(s, size[-1])],
        contestants={
            "ours": direct(kernels.add_rms_norm_forward if add else kernels.rms_norm_forward, EPS),
            "eager": direct(plain_norm),
            "liger": by_liger,
        },
        results=1 + add,
        # x and y, and with the residual that and the sum; weight; rstd
        work=s.bytes_of((2 + 2 * add, *size), size[-1:], fp32=size[0]),
    )


def _norm_backward(s: Setting, kernels: Any, *, add: bool, trained: bool) -> Op:
    size = (s.tokens, s.shape.H)

    def inputs() -> list[Tensor]:
        x, dy, *dresidual = (s.draw(*size) for _ in range(2 + add))
        return [dy, x, norm_weight(s, size[-1], trained), _rstd(x), *dresidual]

    def ours(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dresidual: Tensor | None = None) -> Call:
        return lambda: kernels.rms_norm_backward(dy, x, weight, rstd, dresidual=dresidual, need_dweight=trained)

    def by_autograd(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *dresidual: Tensor) -> Call:
        x, weight = leaf(x), leaf(weight.to(s.dtype), trained)
        # The gradient of the other addend is the same tensor.
        outputs = plain_norm(x, *map(torch.zeros_like, dresidual), weight)
        return backward_of(outputs[: 1 + add], [x, weight] if trained else [x], [dy, *dresidual])

    def by_liger(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, *dresidual: Tensor) -> Call:
        weight = weight.to(s.dtype)
        if add:
            module = liger("fused_add_rms_norm")
            forward, backward, more = module.fused_add_rms_norm_forward, module.fused_add_rms_norm_backward, (False,)
            _, x, rstd, *launch, mode = forward(x, torch.zeros_like(x), weight, EPS, 0.0, "llama")
        else:
            module = liger("rms_norm")
            forward, backward, more = module.rms_norm_forward, module.rms_norm_backward, (False, None)
            _, x, rstd, *launch, mode = forward(x, weight, EPS, 0.0, "llama", None)
        arguments = (dy, *dresidual, x, weight, rstd, 0.0, mode, *launch, *more)
        # dx, with the residual once more for it, and dweight
        return lambda: backward(*arguments, needs_dw=trained)[:: 1 + add]

    return Op(
        name=f"{'add_' * add}rms_norm backward {kind(trained)}",
        inputs=inputs,
        contestants={"ours": ours, "eager": by_autograd, "liger": by_liger},
        results=1 + trained,
        # dy, x, dx, and with the residual its gradient; rstd; weight, or its fp32 master and gradient
        work=s.bytes_of((3 + add, *size), *([] if trained else [size[-1:]]), fp32=size[0] + 2 * size[-1] * trained),
    )


def plain_dscale(weight: Tensor, dweight: Tensor, scale: Tensor) -> Tensor:
    return (weight * dweight).sum(0) / scale


def _norm_weights(s: Setting, kernels: Any) -> Iterator[Op]:
    """A trained norm's gradient from that of the product behind it."""
    H = s.shape.H
    for name, outputs in (("qkv", (s.shape.N + 2 * s.shape.K) * s.shape.D), ("gate_up", 2 * s.shape.I)):
        yield Op(
            name=f"linear_dscale {name}",
            inputs=lambda rows=outputs: [
                s.draw(rows, H), s.draw(rows, H, dtype=torch.float32), norm_weight(s, H, trained=True)
            ],
            contestants={"ours": direct(kernels.linear_dscale), "eager": direct(plain_dscale)},
            work=s.bytes_of((outputs, H), fp32=outputs * H + 2 * H),
        )  # fmt: skip


# SwiGLU


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _halves(gate_up: Tensor) -> list[Tensor]:
    return [half.contiguous() for half in gate_up.chunk(2, dim=-1)]


def _swiglu(s: Setting, kernels: Any) -> Iterator[Op]:
    T, I = s.tokens, s.shape.I

    def eager(gate_up: Tensor) -> Call:
        return direct(plain_swiglu)(*_halves(gate_up))

    def by_liger(gate_up: Tensor) -> Call:
        module = liger("swiglu")
        return lambda: module.swiglu_fused_gate_up_forward(gate_up)[1]

    yield Op(
        name="swiglu forward",
        inputs=lambda: [s.draw(T, 2 * I)],
        contestants={"ours": direct(kernels.swiglu_forward), "eager": eager, "liger": by_liger},
        work=s.bytes_of((3, T, I)),  # gate, up, the product
    )
    for trained in (False, True):
        yield _swiglu_backward(s, kernels, trained=trained)


def _swiglu_backward(s: Setting, kernels: Any, *, trained: bool) -> Op:
    """Where the down projection trains, the product is wanted again. The decoder has the same kernel write over gate
    and up; here not, so that every call reads the same numbers."""
    T, I = s.tokens, s.shape.I

    def ours(dy: Tensor, gate_up: Tensor) -> Call:
        def call() -> tuple[Tensor | None, ...]:
            gradient, product = kernels.swiglu_backward(dy, gate_up, need_product=trained)
            return (*gradient.chunk(2, dim=-1), product)

        return call

    def by_autograd(dy: Tensor, gate_up: Tensor) -> Call:
        leaves = [leaf(half) for half in _halves(gate_up)]
        backward = backward_of([plain_swiglu(*leaves)], leaves, [dy])
        return (lambda: (*backward(), plain_swiglu(*leaves).detach())) if trained else backward

    def by_liger(dy: Tensor, gate_up: Tensor) -> Call:
        module = liger("swiglu")

        def call() -> tuple[Tensor, ...]:
            product = module.swiglu_fused_gate_up_forward(gate_up)[1:] if trained else ()
            return (*module.swiglu_fused_gate_up_backward(gate_up, dy).chunk(2, dim=-1), *product)

        return call

    return Op(
        name=f"swiglu backward {kind(trained)}",
        inputs=lambda: [s.draw(T, I), s.draw(T, 2 * I)],
        contestants={"ours": ours, "eager": by_autograd, "liger": by_liger},
        results=2 + trained,
        work=s.bytes_of((5 + trained, T, I)),  # dy, gate, up, dgate, dup, and the product
    )


# The row-wise halves of the losses, what happens between a chunk's products


def plain_cross_entropy(logits: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    *base, labels, scale = inputs
    logits = leaf(logits)
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    total = sum((plain_kl(teacher, logits) for teacher in base), losses)
    return losses.detach(), *torch.autograd.grad(total, logits, scale.expand_as(losses))


def plain_evaluation(logits: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return F.cross_entropy(logits.float(), labels, reduction="none"), logits.argmax(-1) == labels


def plain_kl(base: Tensor, now: Tensor) -> Tensor:
    base, now = (x.float().log_softmax(-1) for x in (base, now))
    return F.kl_div(now, base, log_target=True, reduction="none").sum(-1)


def _losses(s: Setting, kernels: Any) -> Iterator[Op]:
    T, V = s.tokens, s.shape.V

    def inputs() -> list[Tensor]:
        return [s.draw(T, V), s.labels(), torch.full((), 1 / T, device=s.device)]

    def ours(function: Callable, *more: float) -> Callable[..., Call]:
        """The gradient is written over the logits, so only the first call sees them; its work is the same."""
        options = {"ignore_index": -100, "need_dlogits": True}
        return lambda logits, *rest: lambda: (function(logits, *rest, *more, **options)[0], logits)

    for base, *kernel in ((0, kernels.cross_entropy_), (1, kernels.cross_entropy_kl_, 1.0)):
        yield Op(
            name="cross_entropy_kl" if base else "cross_entropy",
            inputs=lambda base=base: [s.draw(T, V) for _ in range(base)] + inputs(),
            contestants={"ours": ours(*kernel), "eager": direct(plain_cross_entropy)},
            results=2,
            work=s.bytes_of((2 + base, T, V), fp32=(1 + base) * T, int64=T),
        )
    yield Op(
        name="cross_entropy evaluation",
        inputs=inputs,
        contestants={
            "ours": direct(kernels.cross_entropy_, ignore_index=-100, need_dlogits=False, need_correct=True),
            "eager": direct(plain_evaluation),
        },
        work=s.bytes_of((T, V), fp32=T, int64=T) + T,
    )
    yield Op(
        name="kl_divergence",
        inputs=lambda: [s.draw(T, V), s.draw(T, V)],
        contestants={"ours": direct(kernels.kl_divergence), "eager": direct(plain_kl)},
        work=s.bytes_of((2, T, V), fp32=T),
    )


# The optimizer's step


def plain_adamw(*inputs: Tensor) -> Call:
    """PyTorch's fused kernel, which clips too, and the copy after it."""
    return _adamw_call(reference.adamw_, *inputs)


def _adamw_call(function: Callable[..., None], *inputs: Tensor) -> Call:
    *tensors, divisor, left_out = inputs
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}

    def call() -> Tensor:
        with torch.no_grad():
            function(*([tensor] for tensor in tensors), **options, divisor=divisor, left_out=left_out)
        return tensors[0]

    return call


def _adamw(s: Setting, kernels: Any) -> Iterator[Op]:
    """Over the matrix of gate and up. Every call makes one more step."""
    size = (2 * s.shape.I, s.shape.H)
    fp32 = {"dtype": torch.float32}

    def inputs() -> list[Tensor]:
        parameter, gradient = s.draw(*size, **fp32), s.draw(*size, **fp32)
        scalars = [torch.full((), value, device=s.device) for value in (0.0, 2.0, 0.0)]  # steps, divisor, left out
        moments = [torch.zeros_like(parameter) for _ in range(2)]
        return [parameter, gradient, *moments, scalars[0], parameter.to(torch.bfloat16), *scalars[1:]]

    elements = size[0] * size[1]
    yield Op(
        name="adamw",
        inputs=inputs,
        contestants={"ours": lambda *inputs: _adamw_call(kernels.adamw_, *inputs), "eager": plain_adamw},
        work=s.bytes_of(fp32=7 * elements) + 2 * elements,  # gradient; weight and moments there and back; the copy
        rivals_work=s.bytes_of(fp32=9 * elements) + 2 * elements,  # the gradient back; the weight for its copy
    )
