"""An op of a training step: its inputs, who competes in it, and the work that no kernel can avoid.

    ours            the function the decoder calls
    eager           what a plain implementation does in PyTorch; a backward is autograd's, timed alone
    liger           liger_kernel.ops, where it is installed (written for 0.8)
    bare products   the matrix products of a loss with nothing between

Everybody computes the same function of the same numbers, each from its own layout: ours has gate and up, and q, k and
v, side by side as one projection leaves them; eager has them apart. Ours takes the fp32 master of a trained norm's
weight, the others its copy in the activations' dtype.

Bytes count each input once and each output once, in their dtypes; FLOPs are of products.

Shapes: T tokens, H hidden, I intermediate, N heads, K key/value heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

EPS = 1e-5
TARGETS = (80, 90, 100)
"""Compute capabilities times ten: Ampere, Hopper, Blackwell."""
Call = Callable[[], Any]
"""What is timed; it returns a tensor, several, or None."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What decides a kernel's shapes, from the model's config.json; and whether heads of q and k are normed."""

    H: int
    I: int
    N: int
    K: int
    D: int
    V: int
    qk_norm: bool = False


MODELS = {
    "llama-2-7b": Shape(H=4096, I=11008, N=32, K=32, D=128, V=32000),
    "llama-3-8b": Shape(H=4096, I=14336, N=32, K=8, D=128, V=128256),
    "llama-3-70b": Shape(H=8192, I=28672, N=64, K=8, D=128, V=128256),
    "qwen3-8b": Shape(H=4096, I=12288, N=32, K=8, D=128, V=151936, qk_norm=True),
}
TINY = Shape(H=64, I=160, N=4, K=2, D=16, V=384, qk_norm=True)
"""For a trial on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all ops of a model share: T ``tokens`` in rows of ``sequence``. The device may be "meta"."""

    shape: Shape
    tokens: int
    sequence: int
    dtype: torch.dtype
    device: str

    def draw(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*size, dtype=dtype or self.dtype, device=self.device).mul_(scale)

    def labels(self) -> Tensor:
        return torch.randint(self.shape.V, (self.tokens,), device=self.device)

    def bytes_of(self, *sizes: tuple[int, ...], fp32: int = 0, int64: int = 0) -> int:
        """Of tensors of these sizes in ``dtype``, and of so many wider numbers."""
        return sum(torch.Size(size).numel() for size in sizes) * self.dtype.itemsize + 4 * fp32 + 8 * int64


@dataclass(frozen=True, kw_only=True)
class Op:
    """One op at one setting.

    Attributes:
        inputs: draws them.
        contestants: by name, ``ours`` first: inputs -> its call.
        results: how many of a call's leading results everybody must agree on.
        unit, work: bytes or FLOPs of a call.
        rivals_work: of the others, where ours does more.
        targets: compute capabilities that it is compiled for.
    """

    name: str
    inputs: Callable[[], Sequence[Tensor]]
    contestants: dict[str, Callable[..., Call]]
    results: int = 1
    unit: Literal["bytes", "flops"] = "bytes"
    work: int
    rivals_work: int | None = None
    targets: tuple[int, ...] = TARGETS


def direct(function: Callable, *more: Any, **options: Any) -> Callable[..., Call]:
    """A function that takes the inputs as they are, and then ``more``."""
    return lambda *inputs: lambda: function(*inputs, *more, **options)


def backward_of(outputs: Sequence[Tensor], leaves: Sequence[Tensor], gradients: Sequence[Tensor]) -> Call:
    """Backward alone: the graph was made once and is kept."""
    return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)


def leaf(tensor: Tensor, trained: bool = True) -> Tensor:
    return tensor.detach().requires_grad_(trained)


def liger(module: str) -> Any:
    """A module of Liger's kernels; an ImportError where it is not installed makes a row that says so."""
    return importlib.import_module(f"liger_kernel.ops.{module}")


def heads_first(x: Tensor) -> Tensor:
    """``[T, heads, D]`` -> the view ``[1, heads, T, D]``."""
    return x[None].transpose(1, 2)


def kind(trained: bool) -> str:
    return "trained" if trained else "frozen"


def norm_weight(s: Setting, width: int, trained: bool = False) -> Tensor:
    """Of a norm: near 1, and where it trains in fp32."""
    return s.draw(width, scale=0.1, dtype=torch.float32 if trained else s.dtype).add_(1)
