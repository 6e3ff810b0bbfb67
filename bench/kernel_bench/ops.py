"""What an op to be timed is made of: its inputs, its contestants, and the helpers they share."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch._functorch.config
from torch import Tensor

from kernel_bench.shapes import ModelShape

Tensors = tuple[Tensor, ...]
Inputs = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One contestant over one set of inputs.

    Attributes:
        call: what is timed.
        result: from what ``call`` returned, the tensors to hold against ours; None where there is nothing to compare.
        overwrites: tensors that ``call`` reads and writes over; they are restored before every timed call, untimed.
        work: bytes or FLOPs of its ideal kernel where they differ from the op's.
        note: what a reader of the row must know.
    """

    call: Callable[[], Any]
    result: Callable[[Any], Tensors] | None = tuple
    overwrites: Tensors = ()
    work: int | None = None
    note: str = ""


Setup = Callable[[Inputs], Run]


class Missing(Exception):
    """A contestant that this machine does not have; an ImportError says the same."""


@dataclass(frozen=True, kw_only=True)
class Op:
    """One row of the table.

    Attributes:
        name: as in shapes.py.
        inputs: draws one set.
        contestants: by name, ``ours`` first.
        unit: what ``work`` counts.
        work: per call, of an ideal kernel.
        count: how ``work`` was counted, in words.
        yardstick: what a contestant's ``share`` is of: the bandwidth of a copy, the speed of the bare products, or the
            fastest attention backend of ours.
    """

    name: str
    inputs: Callable[[], Inputs]
    contestants: dict[str, Setup]
    unit: Literal["bytes", "flops"]
    work: int
    count: str
    yardstick: Literal["copy", "bare products", "fastest backend"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all ops of a model share.

    Attributes:
        shape: of the model.
        tokens: T.
        sequence: length of a packed row, the longest a document can be.
        dtype, device: of the activations.
        generator: of the inputs. Not the device's own: that one stays unusable after a graph's capture has failed.
    """

    shape: ModelShape
    tokens: int
    sequence: int
    dtype: torch.dtype
    device: torch.device
    generator: torch.Generator

    def draw(self, *size: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*size, dtype=self.dtype, device=self.device, generator=self.generator)
        return values.mul_(scale)

    def integers(self, high: int) -> Tensor:
        return torch.randint(high, (self.tokens,), device=self.device, generator=self.generator)

    def bytes_of(self, *sizes: tuple[int, ...], fp32: int = 0, int64: int = 0) -> int:
        """Of tensors of these sizes in ``dtype``, and of so many wider numbers."""
        return sum(torch.Size(size).numel() for size in sizes) * self.dtype.itemsize + 4 * fp32 + 8 * int64


def plain_contestants(setup: Callable[[Inputs, Callable], Run]) -> dict[str, Setup]:
    """The two contestants that share plain functions: as they are, and compiled."""
    return {
        "eager": lambda inputs: setup(inputs, lambda function: function),
        "torch.compile": lambda inputs: setup(inputs, _compiled),
    }


def _compiled(function: Callable) -> Callable:
    # A backward is repeated over one graph, so it may not take what forward kept for its own buffers.
    torch._functorch.config.donated_buffer = False
    return torch.compile(function, dynamic=False)


def liger_ops(module: str) -> Any:
    return importlib.import_module(f"liger_kernel.ops.{module}")


def needs_dw(function: Callable, trained: bool) -> dict[str, bool]:
    """Liger's option to leave out a norm weight's gradient, which its older releases do not have."""
    return {"needs_dw": trained} if "needs_dw" in inspect.signature(function).parameters else {}


def leaves_of(*tensors: Tensor) -> Tensors:
    return tuple(tensor.detach().requires_grad_() for tensor in tensors)


def backward_of(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], gradients: Sequence[Tensor]
) -> Callable[[], Tensors]:
    """Backward alone: the graph was made once and is kept."""
    return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)


def kind(trained: bool) -> str:
    return "trained" if trained else "frozen"


def heads_first(x: Tensor) -> Tensor:
    """``[T, heads, D]`` -> the view ``[1, heads, T, D]``."""
    return x[None].transpose(1, 2)
