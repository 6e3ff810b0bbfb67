"""The one place where a kernel is started, and where what would be started can be recorded instead.

A kernel believes its arguments: a tensor shorter than it thinks is a read of somebody else's memory, rows that lie over
each other are a race, and a write through a pointer goes unnoticed by autograd. So shapes are checked
(:func:`expect`), strides are looked at, and writes over an input are reported (:func:`overwritten`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

__all__ = ["Launch", "expect", "launch", "overwritten", "recorded_launches", "writable_rows"]

# Set, because Triton changes its default: contracting a·b + c to one rounding is faster and no less exact.
_FP_FUSION = True


@dataclass(frozen=True)
class Launch:
    """One kernel as it would have been started: ``kernel[grid](*arguments, **options)``."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def compile(self) -> Any:
        """Compile for the active driver's target from the arguments' types and alignment alone; start nothing."""
        return self.kernel.warmup(*self.arguments, grid=self.grid, **self.options)


_recorder: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start ``kernel`` on the device of its first tensor; nothing to do, nothing started.

    Args:
        kernel: a ``triton.jit`` function.
        grid: number of programs along each axis.
        arguments: tensors and numbers, in the kernel's order.
        options: ``num_warps`` and the kernel's ``constexpr`` parameters.
    """
    if 0 in grid:
        return
    options["enable_fp_fusion"] = _FP_FUSION
    if _recorder is not None:
        _recorder.append(Launch(kernel, grid, arguments, options))
        return
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    # Triton starts on the current device, whatever its arguments live on.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*arguments, **options)


def expect(**tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Hold each named tensor, where there is one, to its shape.

    Raises:
        ValueError: a shape is another.
    """
    for name, (tensor, shape) in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, the other arguments want {list(shape)}")


def writable_rows(x: Tensor) -> bool:
    """Whether a kernel can write over the rows of ``x`` ``[T, ·]``: each is dense and no two share memory."""
    return x.stride(-1) == 1 and (len(x) <= 1 or x.stride(0) >= x.shape[-1])


def overwritten(tensor: Tensor) -> Tensor:
    """Tell autograd that a kernel wrote over ``tensor``, so that whoever saved it is not given the new numbers."""
    increment_version(tensor)
    return tensor


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Within it launches are appended to the list it yields and nothing runs; meta tensors serve as arguments."""
    global _recorder
    before, _recorder = _recorder, []
    try:
        yield _recorder
    finally:
        _recorder = before
