"""The ops made of products and who competes in them: the losses over the output head, attention."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import current_flash_attention_impl, restore_flash_attention_impl

import llama_pro_kernels as kernels
from kernel_bench.ops import (
    Inputs,
    Missing,
    Op,
    Run,
    Setting,
    Setup,
    Tensors,
    backward_of,
    heads_first,
    kind,
    leaves_of,
    liger_ops,
    plain_contestants,
)  # fmt: skip
from llama_pro_kernels.attention_selection import BACKENDS
from llama_pro_kernels.linear_cross_entropy import rows_per_chunk

__all__ = ["product_ops"]


def product_ops(setting: Setting) -> Iterator[Op]:
    for trained in (False, True):
        yield _linear_cross_entropy(setting, trained=trained)
    yield _linear_kl(setting)
    for layout, lengths in layouts(setting.tokens, setting.sequence).items():
        yield _attention_forward(setting, layout, lengths)
        yield _attention_backward(setting, layout, lengths)


# The losses: products with row-wise work between


def plain_loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), labels)


def plain_kl(x_base: Tensor, x_now: Tensor, weight: Tensor) -> Tensor:
    base, now = (F.linear(x, weight).float().log_softmax(-1) for x in (x_base, x_now))
    return F.kl_div(now, base, log_target=True, reduction="none").sum(-1)


def _chunks(s: Setting) -> Iterator[slice]:
    """The rows that ours takes at one time."""
    rows = rows_per_chunk(s.shape.vocab, s.dtype)
    return (slice(start, start + rows) for start in range(0, s.tokens, rows))


def _head(s: Setting) -> Tensor:
    return s.draw(s.shape.vocab, s.shape.hidden, scale=0.02)


def _linear_cross_entropy(s: Setting, *, trained: bool) -> Op:
    T, H, V = s.tokens, s.shape.hidden, s.shape.vocab

    def ours(inputs: Inputs) -> Run:
        x, weight, labels = inputs["x"], inputs["weight"], inputs["labels"]
        scale = torch.full((), 1 / T, device=s.device)
        return Run(
            call=lambda: kernels.linear_cross_entropy_forward(
                x, weight, labels, scale, need_dx=True, need_dweight=trained
            ),
            result=lambda out: out[: 2 + trained],
        )

    def by_autograd(inputs: Inputs, loss: Callable[[Tensor, Tensor, Tensor], Tensor], note: str = "") -> Run:
        (x,), labels = leaves_of(inputs["x"]), inputs["labels"]
        weight = inputs["weight"].detach().requires_grad_(trained)
        wanted = (x, weight) if trained else (x,)

        def forward_and_backward() -> Tensors:
            value = loss(x, weight, labels)
            return (value.detach(), *torch.autograd.grad(value, wanted))

        return Run(call=forward_and_backward, note=note)

    def liger(inputs: Inputs) -> Run:
        function = liger_ops("fused_linear_cross_entropy").fused_linear_cross_entropy_forward
        (x,), labels = leaves_of(inputs["x"]), inputs["labels"]
        weight = inputs["weight"].detach().requires_grad_(trained)

        @torch.no_grad()
        def forward() -> Any:
            return function(x, weight, labels)

        # loss, …, dx, dweight, dbias
        return Run(call=forward, result=lambda out: (out[0], *out[-3:-1])[: 2 + trained])

    def quack(inputs: Inputs) -> Run:
        function = importlib.import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
        # Its search over product kernels would take longer than this whole bench.
        return by_autograd(inputs, partial(function, tuned=False), note="tuned=False")

    def bare(inputs: Inputs) -> Run:
        x, weight = inputs["x"], inputs["weight"]

        def products() -> None:
            dx = torch.empty_like(x)
            for rows in _chunks(s):
                logits = kernels.linear(x[rows], weight)
                kernels.linear_dx(logits, weight, out=dx[rows])
                if trained:
                    kernels.linear_dw(logits, x[rows])

        return Run(call=products, result=None)

    products = 2 + trained
    return Op(
        name=f"linear_cross_entropy {kind(trained)}",
        inputs=lambda: {"x": s.draw(T, H), "weight": _head(s), "labels": s.integers(V)},
        contestants={
            "ours": ours,
            **plain_contestants(lambda inputs, wrap: by_autograd(inputs, wrap(plain_loss))),
            "liger": liger,
            "quack": quack,
            "bare products": bare,
        },
        unit="flops",
        work=2 * products * T * H * V,
        count=f"logits, dx{', dweight' if trained else ''}: {products} products of 2 T H V",
        yardstick="bare products",
    )


def _linear_kl(s: Setting) -> Op:
    T, H, V = s.tokens, s.shape.hidden, s.shape.vocab

    def of(inputs: Inputs, function: Callable[..., Tensor]) -> Run:
        arguments = [inputs[name] for name in ("x_base", "x_now", "weight")]
        return Run(call=lambda: function(*arguments), result=lambda out: (out,))

    def inputs() -> Inputs:
        x_base = s.draw(T, H)
        return {"x_base": x_base, "x_now": s.draw(T, H, scale=0.3).add_(x_base), "weight": _head(s)}

    def bare(inputs: Inputs) -> Run:
        states, weight = (inputs["x_base"], inputs["x_now"]), inputs["weight"]

        def products() -> None:
            for rows in _chunks(s):
                for x in states:
                    kernels.linear(x[rows], weight)

        return Run(call=products, result=None)

    return Op(
        name="linear_kl",
        inputs=inputs,
        contestants={
            "ours": lambda inputs: of(inputs, kernels.linear_kl),
            **plain_contestants(lambda inputs, wrap: of(inputs, wrap(plain_kl))),
            "bare products": bare,
        },
        unit="flops",
        work=2 * 2 * T * H * V,
        count="logits of two states: 2 products of 2 T H V",
        yardstick="bare products",
    )


# Attention within packed documents


def layouts(tokens: int, sequence: int) -> dict[str, list[int]]:
    """Document lengths: whole rows, and rows of five documents that halve in length and divide by nothing."""
    ragged = [sequence // 2 - 1, sequence // 4 + 1, sequence // 8 - 1, sequence // 16 + 1]
    ragged.append(sequence - sum(ragged))
    rows = tokens // sequence
    return {"full": [sequence] * rows, "ragged": ragged * rows}


def _attention(s: Setting, layout: str, lengths: list[int], name: str, *, products: int, **more: Any) -> Op:
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    N, D = s.shape.heads, s.shape.head_dim
    return Op(
        name=f"{name} {layout}",
        unit="flops",
        work=2 * products * pairs * N * D,
        count=f"{products} products of 2 N D for each of {pairs:,} pairs of query and key in {len(lengths)} documents",
        yardstick="fastest backend",
        **more,
    )


def _attention_inputs(s: Setting, *given: str) -> Inputs:
    heads = {"q": s.shape.heads, "k": s.shape.kv_heads, "v": s.shape.kv_heads, "do": s.shape.heads}
    return {name: s.draw(s.tokens, heads[name], s.shape.head_dim) for name in ("q", "k", "v", *given)}


def _packed(s: Setting, lengths: list[int], backend: str) -> tuple[tuple[Tensor, int], dict[str, Any]]:
    """The arguments of our attention after q, k, v."""
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(s.device)
    try:
        chosen = kernels.select_attention_backend(s.device, s.dtype, requested=backend, head_dim=s.shape.head_dim)
    except ValueError as error:
        raise Missing(str(error).split(";")[0]) from error
    return (bounds, max(lengths)), {"scale": s.shape.head_dim**-0.5, "backend": chosen}


def _by_backend(s: Setting, setup: Callable[[Inputs, str], Run]) -> dict[str, Setup]:
    """Ours by the backend that a run would get, and every other one that can serve."""
    auto = kernels.select_attention_backend(s.device, s.dtype, head_dim=s.shape.head_dim)
    return {"ours": partial(setup, backend="auto")} | {
        f"backend {name}": partial(setup, backend=name) for name in BACKENDS if name != auto
    }


def _batches(lengths: list[int], x: Tensor) -> list[Tensor]:
    """Views ``[B, heads, L, D]`` of ``[T, heads, D]``: one where all documents are of one length, else one for each."""
    if len(set(lengths)) == 1:
        return [x.unflatten(0, (len(lengths), -1)).transpose(1, 2)]
    return [heads_first(document) for document in x.split(lengths)]


def _unbatched(batches: Sequence[Tensor]) -> Tensor:
    return torch.cat([batch.transpose(1, 2).flatten(0, 1) for batch in batches])


def _sdpa(s: Setting) -> Callable[..., Tensor]:
    if current_flash_attention_impl() is not None:  # the backend before it left another one behind PyTorch's
        restore_flash_attention_impl()
    grouped = s.shape.heads != s.shape.kv_heads
    return partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=grouped)


def _attention_forward(s: Setting, layout: str, lengths: list[int]) -> Op:
    def ours(inputs: Inputs, backend: str) -> Run:
        q, k, v = inputs["q"], inputs["k"], inputs["v"]
        documents, options = _packed(s, lengths, backend)
        return Run(
            call=lambda: kernels.attention_forward(q, k, v, *documents, **options),
            result=lambda out: out[:1],
            note=f"backend {options['backend']}",
        )

    def eager(inputs: Inputs) -> Run:
        attention = _sdpa(s)
        documents = list(zip(*(_batches(lengths, inputs[name]) for name in "qkv"), strict=True))
        return Run(
            call=lambda: [attention(*document) for document in documents],
            result=lambda out: (_unbatched(out),),
            note=f"scaled_dot_product_attention, calls: {len(documents)}",
        )

    return _attention(
        s, layout, lengths, "attention forward", products=2,
        inputs=lambda: _attention_inputs(s), contestants=_by_backend(s, ours) | {"eager": eager},
    )  # fmt: skip


def _attention_backward(s: Setting, layout: str, lengths: list[int]) -> Op:
    def ours(inputs: Inputs, backend: str) -> Run:
        do, q, k, v = (inputs[name] for name in ("do", "q", "k", "v"))
        documents, options = _packed(s, lengths, backend)
        o, lse = kernels.attention_forward(q, k, v, *documents, **options)
        return Run(
            call=lambda: kernels.attention_backward(do, q, k, v, o, lse, *documents, **options),
            note=f"backend {options['backend']}",
        )

    def eager(inputs: Inputs) -> Run:
        attention = _sdpa(s)
        documents = [
            leaves_of(*tensors) for tensors in zip(*(_batches(lengths, inputs[n]) for n in "qkv"), strict=True)
        ]
        leaves = [tensor for document in documents for tensor in document]
        outputs = [attention(*document) for document in documents]
        return Run(
            call=backward_of(outputs, leaves, _batches(lengths, inputs["do"])),
            result=lambda out: tuple(_unbatched(out[i::3]) for i in range(3)),
            note=f"scaled_dot_product_attention, calls: {len(documents)}",
        )

    return _attention(
        s, layout, lengths, "attention backward", products=5,
        inputs=lambda: _attention_inputs(s, "do"), contestants=_by_backend(s, ours) | {"eager": eager},
    )  # fmt: skip
