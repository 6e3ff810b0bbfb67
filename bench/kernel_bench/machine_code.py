"""What a compiled kernel costs and how it touches memory, read from its machine code; no GPU needed.

Registers, stack and spills come from the cubin, by the ``cuobjdump`` and ``nvdisasm`` that lie in Triton's package.
Which argument an access belongs to is not in the machine code any more but is in the PTX before it, where an address is
a chain of additions from a pointer parameter; so the widths per argument come from there, and the machine code is held
against them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["MachineCode", "compile_for", "disassemble"]

WIDE = 128
"""Bits of the widest access a thread can make."""


@dataclass(frozen=True, kw_only=True)
class MachineCode:
    """One kernel for one target: registers and bytes of stack a thread, load and store instructions on local memory,
    bytes of shared memory a program, conversions of two numbers to e4m3, and for each argument how many global accesses
    there are of each width in bits."""

    registers: int
    stack: int
    spills: int
    shared: int
    casts: int
    accesses: dict[str, Counter[int]]

    def narrow(self, argument: str, wide: int = WIDE) -> int:
        """Accesses of ``argument`` below so many bits."""
        return sum(count for bits, count in self.accesses.get(argument, Counter()).items() if bits < wide)


class _Driver:
    """As much of a driver as Triton asks before it compiles: the target."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # a kernel's cache is per device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_for(capability: int, launch: Any) -> Any:
    """The kernel of a recorded launch for ``sm_<capability>``, specialised as Triton would for these very arguments."""
    import triton

    triton.runtime.driver.set_active(_Driver(capability))
    try:
        return launch.compile()
    finally:
        triton.runtime.driver.set_active(None)  # so that the machine's own is found again when it is asked for


def disassemble(compiled: Any) -> MachineCode:
    """Read a compiled kernel.

    Raises:
        RuntimeError: Triton's tools are missing or answer in another form; or machine code and PTX access memory in
            different widths.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", _tool("cuobjdump", "-res-usage", str(cubin)))
        assembly = _tool("nvdisasm", "-c", str(cubin))
    if usage is None:
        raise RuntimeError("cuobjdump -res-usage printed no registers")
    accesses = _accesses_by_argument(compiled.asm["ptx"], _argument_names(compiled))
    widths = Counter(_sass_bits(kind) for kind in re.findall(r"\b(?:LDG|STG)((?:\.[A-Z0-9_]+)*)", assembly))
    of_ptx = sum(accesses.values(), Counter())
    # What comes after PTX may merge wide accesses, or unroll a loop and so repeat all in it. Narrow ones that grow by
    # more than the wide ones do would be wide ones split.
    more = sum(max(0, widths[bits] - of_ptx[bits]) for bits in widths if bits < WIDE)
    if set(widths) != set(of_ptx) or more > max(0, widths[WIDE] - of_ptx[WIDE]):
        raise RuntimeError(f"machine code accesses {dict(widths)} bits, its PTX {dict(of_ptx)}")
    return MachineCode(
        registers=int(usage[1]),
        stack=int(usage[2]),
        shared=int(usage[3]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
        casts=compiled.asm["ptx"].count("cvt.rn.satfinite.e4m3x2."),  # of float32; by Triton 3.6 for sm_89 of float16
        accesses=accesses,
    )


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise RuntimeError(f"{path} is missing; this Triton was built without NVIDIA's tools")
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip()}")
    return done.stdout + done.stderr


def _argument_names(compiled: Any) -> list[str]:
    """Names of the kernel's parameters in PTX order: what was specialised away has none."""
    return [name for name, type_ in compiled.src.signature.items() if type_ != "constexpr"]


def _sass_bits(modifiers: str) -> int:
    """Width of ``LDG.E.128``, ``STG.E.U16``; 32 where nothing is said."""
    sizes = [int(size) for size in re.findall(r"\.[US]?(8|16|64|128|256)(?=\.|$)", modifiers)]
    return sizes[-1] if sizes else 32


def _accesses_by_argument(ptx: str, names: list[str]) -> dict[str, Counter[int]]:
    """Global accesses of each pointer parameter by width in bits."""
    others = set(re.findall(r"\b(?:atom|red|cp\.async)[\w.:]*\.global[\w.:]*", ptx))
    if others:
        raise RuntimeError(f"PTX accesses memory by {', '.join(sorted(others))}, which is not read here")
    origin: dict[str, set[str]] = {}
    for match in re.finditer(r"ld\.param\.b64\s+(%rd\d+), \[\w+_param_(\d+)\]", ptx):
        index = int(match[2])
        if index < len(names) and names[index].endswith("_ptr"):
            origin[match[1]] = {names[index]}
    # Addresses are sums, products and choices of registers; what is loaded from memory is no address here.
    arithmetic = re.findall(r"^\s*(?:@!?%p\d+ )?(?:add|sub|mad|mov|cvta|selp)[\w.]*\s+(%rd\d+), (.*);$", ptx, re.M)
    while True:
        before = sum(map(len, origin.values()))
        for target, sources in arithmetic:
            for source in re.findall(r"%rd\d+", sources):
                origin.setdefault(target, set()).update(origin.get(source, ()))
        if sum(map(len, origin.values())) == before:
            break

    accesses: dict[str, Counter[int]] = {}
    pattern = r"\b(?:ld|st)\.global((?:[.:]\w+)*)\s+[^;]*?\[\s*(%rd\d+)"
    for modifiers, register in re.findall(pattern, ptx):
        names_of = origin.get(register, set())
        if len(names_of) != 1:
            raise RuntimeError(f"PTX access through {register} belongs to {sorted(names_of) or 'no argument'}")
        vector = re.search(r"\.v(\d)", modifiers)
        element = re.search(r"\.[busf](\d+)$", modifiers)
        if element is None:
            raise RuntimeError(f"PTX access of unknown width: {modifiers}")
        bits = (int(vector[1]) if vector else 1) * int(element[1])
        accesses.setdefault(next(iter(names_of)), Counter())[bits] += 1
    return accesses
