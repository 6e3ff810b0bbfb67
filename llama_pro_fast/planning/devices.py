"""The cards a run may be planned for: what they hold and how fast they are, and how much of either a plan counts on."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from llama_pro_fast.host import available_memory

GIB = 2**30

CONTEXT = GIB
"""Of a card, outside PyTorch's allocator: the CUDA context (0.5 GiB on an 80 GB card when kernels load lazily, 0.9 when
they do not: stas00/ml-engineering, training/performance) and libraries' workspaces."""

SPARE = 0.05
"""Of what is left, for blocks the allocator holds and cannot use: 4 % of an H200 when a sequence of 32,768 tokens,
planned at 97 %, found no room (docs/LOG.md)."""

SHARE = 0.5
"""Of a card's dense bf16 peak, what products and attention reach over whole steps. An H200 reached 0.53 with PyTorch's
FlashAttention 2 and 0.59 with FlashAttention 4, LLaMA-2-7B + 8 at 8,192 tokens a step (docs/LOG.md); narrower models
and other cards were not measured."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A card, or the CPU.

    Attributes:
        title: for people.
        memory: bytes PyTorch can reach; of a card the least of what users' messages report for it.
        flops: dense bf16 products with float32 sums, FLOP/s (data sheet).
        bandwidth: of its memory, bytes/s (data sheet).
        link: to the other cards of its machine, bytes/s in one direction (data sheet: NVLink, or PCIe 4.0 x 16).
        eight_bits: whether it multiplies e4m3, or imitates that.
        speed_known: whether these are of this device; else they only weigh a byte against a FLOP.
    """

    title: str
    memory: int
    flops: float
    bandwidth: float
    link: float
    is_cpu: bool = False
    eight_bits: bool = True
    speed_known: bool = True

    @property
    def usable(self) -> int:
        """Bytes a plan may fill."""
        return self.memory if self.is_cpu else int((self.memory - CONTEXT) * (1 - SPARE))


def _card(
    title: str, gib: float, tflops: float, terabytes: float, gigabytes: float, *, eight_bits: bool = True
) -> Device:
    speeds = {"flops": tflops * 1e12, "bandwidth": terabytes * 1e12, "link": gigabytes * 1e9}
    return Device(title=title, memory=int(gib * GIB), eight_bits=eight_bits, **speeds)


IN_A_MACHINE, NETWORK = 8, 50e9
"""Cards of one machine, and bytes/s of the network between machines, a 400 Gb/s adapter for each card."""

DEVICES = {
    "h200": _card("H200 141 GB", 139.7, 989, 4.8, 450),
    "h100": _card("H100 80 GB", 79.1, 989, 3.35, 450),
    "a100-80": _card("A100 80 GB", 79.1, 312, 2.039, 300, eight_bits=False),
    "a100-40": _card("A100 40 GB", 39.4, 312, 1.555, 300, eight_bits=False),
    "4090": _card("RTX 4090 24 GB", 23.5, 165, 1.008, 31.5),
}
"""By the name `--gpu` takes, the largest first. The H100 is the SXM one."""


def cpu(processes: int = 1) -> Device:
    """This machine's processor, with what is free of its memory now for one of so many processes."""
    free = int(0.9 * available_memory()) // processes
    return Device(title="CPU", memory=free, flops=1e11, bandwidth=2e10, link=1e10, is_cpu=True, speed_known=False)


def present(index: int = 0) -> Device:
    """The device of this machine: its GPU of that number with what is free of it now, or the CPU."""
    if not torch.cuda.is_available():
        return cpu()
    name = torch.cuda.get_device_name(index)
    known = next((device for device in DEVICES.values() if _same(device, name)), None)
    free, _ = torch.cuda.mem_get_info(index)
    alike = known or DEVICES["h100"]
    # The context is there by now, but not what libraries and kernels load when they are first used.
    return Device(
        title=name,
        memory=free + CONTEXT // 2,
        flops=alike.flops,
        bandwidth=alike.bandwidth,
        link=alike.link,
        eight_bits=known.eight_bits if known else torch.cuda.get_device_capability(index) >= (8, 9),
        speed_known=known is not None,
    )


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a device that is here, FLOP/s; None where no data sheet says."""
    if device.type != "cuda":
        return None
    here = present()
    return here.flops if here.speed_known else None


def _same(device: Device, name: str) -> bool:
    """Whether PyTorch's name of a GPU, such as ``NVIDIA H100 80GB HBM3``, is of this row.

    A namesake with another chip, or a slice of a card, is not: an H100 without its size in the name is the PCIe or the
    NVL one, both slower.
    """
    words, row = set(name.replace("-", " ").split()), device.title.replace(" GB", "GB").split()
    model, size = row[-2], row[-1]
    named = model in words and (size in words or model in ("H200", "4090"))
    return named and words.isdisjoint({"Laptop", "D", "NVL", "MIG"})


def expandable_segments() -> None:
    """Let PyTorch's allocator grow what it holds, where the user has not told it otherwise; before CUDA is
    initialised.

    A step's tensors differ in size from block to block, and blocks of fixed size end up as holes.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
