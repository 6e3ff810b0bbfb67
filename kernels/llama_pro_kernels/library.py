"""Where the functional ops are registered with PyTorch, and which implementation an op gets.

Registered, an op is one opaque node: ``torch.compile`` carries it without a graph break and without looking inside
(Inductor types a kernel's float arguments as fp64 when it does), fake tensors get its shapes, and ``FlopCounterMode``
its products. Counted are products only, as PyTorch does it: norms, activations and rotations are work without FLOPs.

PyTorch's dispatcher takes longer over a call than a small kernel runs. So where only the op itself would look at the
arguments, its body is called directly: inside the autograd functions, and whenever no gradients are recorded.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _len_torch_dispatch_stack
from torch.utils.flop_counter import register_flop_formula

from . import reference

__all__ = ["Consumed", "implementation", "implementation_name", "register"]


def implementation(x: Tensor) -> ModuleType:
    """The module with the op's body: Triton for CUDA tensors, or for any under ``TRITON_INTERPRET=1``; else reference.

    fp64 always takes the reference: Triton computes in fp32, and whoever asks for fp64 asks for more.

    Raises:
        ImportError: a CUDA tensor, and Triton is not installed.
    """
    if x.dtype == torch.float64 or not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return reference
    try:
        from . import triton_kernels
    except ImportError as error:
        raise ImportError(f"llama_pro_kernels needs Triton for tensors on {x.device}: pip install triton") from error
    return triton_kernels


def implementation_name(device: torch.device | str, dtype: torch.dtype) -> str:
    """What tensors of this kind get, to be printed when a run starts: ``pytorch`` or ``triton`` and its version."""
    if implementation(torch.empty(0, device=device, dtype=dtype)) is reference:
        return "pytorch"
    interpreted = ", interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else ""
    return f"triton {importlib.metadata.version('triton')}{interpreted}"


def register(
    schema: str, *, fake: Callable[..., Any], flops: Callable[..., int] | None = None
) -> Callable[[Callable[..., Any]], Any]:
    """Decorator that makes a function ``torch.ops.llama_pro_kernels.NAME``, and calls it without the dispatcher where
    nobody else is there to see the call.

    Args:
        schema: ``NAME(arguments) -> results`` in PyTorch's schema language.
        fake: from the arguments, empty tensors like the results.
        flops: from the arguments, FLOPs of the products inside.
    """
    name, rest = schema.split("(", 1)

    def decorate(body: Callable[..., Any]) -> Any:
        op = torch.library.custom_op(f"llama_pro_kernels::{name}", body, mutates_args=(), schema=f"({rest}")
        op.register_fake(fake)
        if flops is not None:
            count = flops
            register_flop_formula(getattr(torch.ops.llama_pro_kernels, name), get_raw=True)(
                lambda *args, out_val=None, **kwargs: count(*args, **kwargs)
            )

        @functools.wraps(body)
        def call(*arguments: Any) -> Any:
            return body(*arguments) if _unobserved(arguments) else op(*arguments)

        return call

    return decorate


def _unobserved(arguments: tuple[Any, ...]) -> bool:
    """Whether a call is for the op alone: there is no compiler, no graph, no dispatch mode (fake tensors, FLOP counts)
    and no tensor of a class of its own."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or _len_torch_dispatch_stack():
        return False
    return not any(isinstance(each, Tensor) and type(each) not in (Tensor, nn.Parameter) for each in arguments)


class Consumed:
    """Whether backward has written over what forward kept, for an autograd context whose backward does.

    Version counters are no guard: they see neither a write through a raw pointer nor tensors that went through saved
    tensor hooks. So backward asks first, before it looks at any saved tensor.
    """

    def __init__(self, op: str) -> None:
        self._op = op
        self._done = False

    def once(self) -> None:
        """Mark as consumed.

        Raises:
            RuntimeError: it was already.
        """
        if self._done:
            raise RuntimeError(
                f"{self._op}: backward ran a second time, but the first wrote its gradient over what forward had kept; "
                "run forward again instead of retain_graph=True"
            )
        self._done = True
