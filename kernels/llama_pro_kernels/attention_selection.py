"""Which attention backend serves a run: what each can do, as data, and the choice.

What a row says was read in the sources of PyTorch 2.11 to 2.14, FlashAttention 2.8, 3 and 4, and cuDNN's frontend; the
reason for a number stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from typing import Literal

import torch
from torch.torch_version import TorchVersion

__all__ = ["BACKENDS", "Backend", "Requirement", "select_attention_backend"]


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """Something a backend needs installed.

    Attributes:
        what: its name.
        found: returns the version that is there ("" where it has none), or None. Imports nothing: a package for another
            GPU may fail when it is imported.
        minimum, maximum: the least and the newest version that will do; None where any does.
        remedy: what the user can do.
    """

    what: str
    found: Callable[[], str | None]
    minimum: str | None = None
    maximum: str | None = None
    remedy: str

    def unmet(self) -> str | None:
        """Why it is not fulfilled, or None."""
        found = self.found()
        if found is not None and self.maximum is not None and TorchVersion(found) > self.maximum:
            return f"needs {self.what} {self.maximum} or older, here is {found}: {self.remedy}"
        if found is not None and (self.minimum is None or TorchVersion(found) >= self.minimum):
            return None
        wanted = f"needs {self.what} {self.minimum} or newer" if self.minimum else f"needs {self.what}"
        return f"{wanted}, here is {found or 'none'}: {self.remedy}"


def _package(name: str, *, minimum: str, maximum: str | None = None, remedy: str) -> Requirement:
    def found() -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return Requirement(what=f"the package {name}", found=found, minimum=minimum, maximum=maximum, remedy=remedy)


def _cudnn_version() -> str | None:
    version = torch.backends.cudnn.version()
    return None if version is None else f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _torch(minimum: str) -> Requirement:
    return Requirement(
        what="PyTorch", found=lambda: str(torch.__version__), minimum=minimum, remedy="pip install -U torch"
    )


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What one backend can do.

    Attributes:
        device: "cpu", "cuda" or, for either, None.
        capability: least compute capability, on CUDA.
        below: the first capability it does not serve any more; None for all newer ones.
        dtypes: None for any.
        max_head_dim: None for any. A bounded head dim must also be a multiple of 8, 16 bytes.
        window: whether it has a sliding window.
        deterministic: whether backward sums in a fixed order: always, never, or under the switch
            ``torch.use_deterministic_algorithms(True)``.
        max_deterministic_head_dim: where that holds for smaller head dims only.
        auto_head_dims: those for which it is taken unasked, as it ran with them; None for all.
        requires: what must be installed.
    """

    device: Literal["cpu", "cuda"] | None
    capability: tuple[int, int] = (0, 0)
    below: tuple[int, int] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    max_head_dim: int | None = None
    window: bool = True
    deterministic: Literal["always", "switch", "never"] = "always"
    max_deterministic_head_dim: int | None = None
    auto_head_dims: tuple[int, ...] | None = None
    requires: tuple[Requirement, ...] = ()

    def obstacle(
        self, device: torch.device, dtype: torch.dtype, window: int | None, head_dim: int | None, deterministic: bool
    ) -> str | None:
        """Why it cannot serve a run, or None."""
        if self.device is not None and self.device != device.type:
            return f"runs on {'the CPU' if self.device == 'cpu' else 'CUDA'}, not on {device.type}"
        if self.dtypes is not None and dtype not in self.dtypes:
            names = " or ".join(_name(known) for known in self.dtypes)
            return f"computes in {names}, not in {_name(dtype)}"
        if window is not None and not self.window:
            return "has no sliding window"
        if self.max_head_dim is not None and head_dim is not None and (head_dim % 8 or head_dim > self.max_head_dim):
            return f"serves head dims that are multiples of 8 up to {self.max_head_dim}, not {head_dim}"
        if deterministic and self.deterministic == "never":
            return "has no deterministic backward"
        limit = self.max_deterministic_head_dim
        if deterministic and limit is not None and head_dim is not None and head_dim > limit:
            return f"has a deterministic backward for head dims up to {limit}, not for {head_dim}"
        if self.device == "cuda":
            if not torch.cuda.is_available():
                return "finds no CUDA device"
            capability = torch.cuda.get_device_capability(device)
            if capability < self.capability or (self.below is not None and capability >= self.below):
                upper = "or newer" if self.below is None else f"to below {_dotted(self.below)}"
                return (
                    f"needs compute capability {_dotted(self.capability)} {upper}, and "
                    f"{torch.cuda.get_device_name(device)} has {_dotted(capability)}"
                )
        return next((reason for requirement in self.requires if (reason := requirement.unmet())), None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dotted(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


_HALVES = (torch.bfloat16, torch.float16)

BACKENDS = {
    "flash_3": Backend(
        device="cuda",
        capability=(9, 0),
        below=(10, 0),
        dtypes=_HALVES,
        max_head_dim=256,
        deterministic="switch",
        max_deterministic_head_dim=192,  # its backward refuses the flag where the head dim rounds up to 256
        requires=(
            Requirement(
                what="FlashAttention 3 (the module flash_attn_interface)",
                found=lambda: None if util.find_spec("flash_attn_interface") is None else "",
                remedy="build it from the folder hopper of https://github.com/Dao-AILab/flash-attention",
            ),
        ),
    ),
    "flash_4": Backend(
        device="cuda",
        capability=(9, 0),
        below=(11, 0),
        dtypes=_HALVES,
        max_head_dim=128,  # capability 9 goes on to 256, capability 10 does not
        auto_head_dims=(64, 128),
        deterministic="switch",
        # Its functions have changed their arguments more than once; this is the release that was run.
        requires=(
            _package(
                "flash-attn-4", minimum="4.0.0b36", maximum="4.0.0b36", remedy="pip install flash-attn-4==4.0.0b36"
            ),
        ),
    ),
    "flash": Backend(
        device="cuda",
        capability=(8, 0),
        dtypes=_HALVES,
        max_head_dim=256,
        deterministic="switch",
        requires=(
            Requirement(
                what="a PyTorch with flash attention",
                found=lambda: "" if torch.backends.cuda.is_flash_attention_available() else None,
                remedy="install the CUDA build of PyTorch",
            ),
        ),
    ),
    "flash_attn": Backend(
        device="cuda",
        capability=(8, 0),
        dtypes=_HALVES,
        max_head_dim=256,
        deterministic="switch",
        requires=(_package("flash-attn", minimum="2.8", remedy="pip install -U flash-attn --no-build-isolation"),),
    ),
    "cudnn": Backend(
        device="cuda",
        capability=(9, 0),
        below=(11, 0),
        dtypes=_HALVES,
        max_head_dim=128,
        window=False,
        deterministic="never",
        requires=(
            # Before, the packed backward took the head dim for the longest document and wrote beyond its buffer
            # (pytorch pull request 186142), and lse had another layout.
            _torch("2.14"),
            # Before, an empty document spoilt its neighbours' results with NaN (cudnn-frontend issue 943).
            Requirement(
                what="cuDNN",
                found=_cudnn_version,
                minimum="9.25",
                remedy="pip install -U nvidia-cudnn-cu12 or -cu13, as PyTorch's CUDA",
            ),
        ),
    ),
    "cpu_flash": Backend(device="cpu", window=False),
    "reference": Backend(device=None),
}

# What "auto" tries, in this order, by the major compute capability. Causal, head dim 128, TFLOP/s forward / backward:
# measured on an H200 FlashAttention 4 has 650 / 577 and PyTorch's FlashAttention 2 327 / 281, 4,096 tokens a document
# (docs/LOG.md); published are for an H100 580-685 / 445-560 of FlashAttention 3, which has to be built from source, and
# for a B200, where 3 does not run, 1,381 / 1,082 of 4 (flash-attention pull request 2150). A backend without such a
# figure for a capability is not in its row; cuDNN nowhere, since its figures (600 / 500 here) are for dense batches and
# its packed path is young. Built-in FlashAttention 2 comes before the package with the same kernels, for it was built
# and tested with its PyTorch. A package that is installed counts as wanted.
_FOR_ANY = ("flash", "flash_attn", "cpu_flash", "reference")
_PREFERENCE = {9: ("flash_4", "flash_3", *_FOR_ANY), 10: ("flash_4", *_FOR_ANY)}


def select_attention_backend(
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    requested: str = "auto",
    window: int | None = None,
    head_dim: int | None = None,
    deterministic: bool = False,
) -> str:
    """The backend for a run: the one preferred among those that can serve it, or the requested one if it can.

    Args:
        device: where q, k and v live.
        dtype: their dtype.
        requested: a backend's name, or "auto".
        window: sliding window, None for none.
        head_dim: D; None leaves the backends' limits on it unchecked.
        deterministic: whether backward must sum in a fixed order.

    Raises:
        ValueError: the requested backend is unknown or cannot serve the run; or a deterministic run would get a backend
            that repeats only under ``torch.use_deterministic_algorithms(True)`` while that is not set.
    """
    device = torch.device(device)
    obstacles = {
        name: backend.obstacle(device, dtype, window, head_dim, deterministic) for name, backend in BACKENDS.items()
    }
    if requested == "auto":
        on_cuda = device.type == "cuda" and torch.cuda.is_available()
        major = torch.cuda.get_device_capability(device)[0] if on_cuda else None
        name = next(
            name
            for name in _PREFERENCE.get(major, _FOR_ANY)
            if obstacles[name] is None and head_dim in (BACKENDS[name].auto_head_dims or (head_dim,))
        )
    else:
        name = requested
        reason = obstacles.get(name, "there is no such backend")
        if reason is not None:
            available = ", ".join(name for name, obstacle in obstacles.items() if obstacle is None)
            raise ValueError(f"attention backend {name!r}: {reason}; available here: auto, {available}")
    if deterministic and BACKENDS[name].deterministic == "switch" and not deterministic_algorithms():
        raise ValueError(
            f"attention backend {name!r}: its backward is deterministic only under "
            "torch.use_deterministic_algorithms(True); set that first or ask for 'reference'"
        )
    return name


def deterministic_algorithms() -> bool:
    """Whether PyTorch's switch is on; set to warn only, it makes no kernel deterministic."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
