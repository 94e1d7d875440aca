"""Machine code of Triton kernels for a GPU that is not there: what they need, and what a walk over chunks executes.

The compiler, the assembler and the disassembler come with the package triton. A kernel's loops are found in the code
as branches back, in the order of the loops of Triton's own representation, which knows how often each runs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
BRANCH = re.compile(r"(@!?U?P\w+\s+)?BRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?(?:`\(\S+\)|0x([0-9a-f]+))")
LOOP = re.compile(r"scf\.for %\S+ = (\S+) to (\S+) step (\S+)")
CONSTANT = re.compile(r"%c(\d+)_i32\w*$")
BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
"""Bytes of a thread's load or store by its modifiers; without one of these it is 4."""
LONGEST_PREDICATED = 40
"""Most instructions that the assembler jumps over for reasons of its own; a longer jump is an `if` of the kernel."""


class Instruction(NamedTuple):
    """One line of machine code: its address, its name without modifiers, and its text."""

    address: int
    name: str
    text: str


class MachineCode(NamedTuple):
    """A compiled kernel.

    Attributes:
        registers: Number of registers of a thread.
        stack: Bytes of local memory of a thread, for what found no register.
        shared: Bytes of shared memory of a program.
        code: Instructions in order.
        trips: Trips of each loop, in order; None where they are known only at run time.
    """

    registers: int
    stack: int
    shared: int
    code: list[Instruction]
    trips: list[int | None]

    def executed(self, trips: Sequence[float], walk: int) -> Counter[str]:
        """Count the instructions that a warp executes in one turn of a loop, by name. Arguments as in `weigh`."""
        total: Counter[str] = Counter()
        for line, weight in self.weigh(trips, walk):
            total[line.name] += weight
        return total

    def moved(self, trips: Sequence[float], walk: int) -> float:
        """Count the bytes that a warp's loads and stores ask of global memory in one turn of a loop, caches included.

        Arguments as in `weigh`.
        """
        total = 0.0
        for line, weight in self.weigh(trips, walk):
            if line.name in ("LDG", "STG"):
                each = [BYTES[part] for part in re.findall(r"\.(\w+)", line.text.split("[")[0]) if part in BYTES]
                total += weight * (each or [4])[0] * 32
        return total

    def weigh(self, trips: Sequence[float], walk: int) -> list[tuple[Instruction, float]]:
        """Pair the instructions of one turn of a loop with how often a warp executes them.

        An `if` in a loop whose trips are known counts as taken in one of them.

        Args:
            trips: Trips of the loops whose number is known only at run time, in order.
            walk: Number of the loop that turns once, counted from 0.

        Raises:
            ValueError: If the code has other loops than Triton's representation.
        """
        known, place = iter(trips), {line.address: n for n, line in enumerate(self.code)}
        spans = sorted(_spans(self.code, place, back=True))
        if len(spans) != len(self.trips):
            raise ValueError(f"the machine code has {len(spans)} loops, and the kernel {len(self.trips)}")
        weights, fixed = [1.0] * len(self.code), []
        for (first, last), trip in zip(spans, self.trips, strict=True):
            fixed += [] if trip is None else [(first, last, trip)]
            trip = next(known) if trip is None else trip
            for n in range(first, last + 1):
                weights[n] *= trip
        for first, last in _spans(self.code, place, back=False):
            inside = [trip for begin, end, trip in fixed if begin <= first and last <= end]
            if inside and last - first > LONGEST_PREDICATED:
                for n in range(first, last + 1):
                    weights[n] /= inside[-1]
        first, last = spans[walk]
        return list(zip(self.code[first : last + 1], weights[first : last + 1], strict=True))


def _spans(code: list[Instruction], place: Mapping[int, int], *, back: bool) -> Iterator[tuple[int, int]]:
    """Find jumps: first and last instruction of what a jump back repeats, or of what a conditional one leaves out."""
    for n, line in enumerate(code):
        found = BRANCH.match(line.text)
        if found is None or found[2] is None or int(found[2], 16) == line.address:
            continue
        target = place[int(found[2], 16)]
        if back and target < n:
            yield target, n
        if not back and target > n and (found[1] or "P" in line.text):
            yield n + 1, target - 1


def _trips(ttgir: str) -> list[int | None]:
    trips = []
    for line in ttgir.splitlines():
        if found := LOOP.search(line):
            numbers = [CONSTANT.match(part) for part in found.groups()]
            first, last, step = (int(number[1]) if number else None for number in numbers)
            trips.append(None if None in (first, last, step) else -(-(last - first) // step))
    return trips


def compile_kernel(
    kernel: Any,
    kinds: Mapping[str, str],
    constants: Mapping[str, Any],
    warps: int,
    capability: int = 90,
    aligned: tuple[str, ...] = (),
) -> MachineCode:
    """Compile a kernel as a launch would, for a GPU of a compute capability, and read the machine code.

    Args:
        kernel: Kernel, decorated by `triton.jit`.
        kinds: Types by argument, in Triton's notation.
        constants: Values of arguments that are compiled in.
        warps: Number of warps of a program.
        capability: Compute capability, without the point.
        aligned: Integers that are multiples of 16, as pointers always are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {
        (n,): [["tt.divisibility", 16]]
        for n, name in enumerate(kernel.arg_names)
        if kinds[name].startswith("*") or name in aligned
    }
    source = ASTSource(kernel, signature=dict(kinds), constexprs=dict(constants), attrs=attributes)
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": 1}
    )
    tool = disassembler()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("--dump-resource-usage", "-sass")
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return MachineCode(registers, stack, compiled.metadata.shared, list(_read(sass)), _trips(compiled.asm["ttgir"]))


def disassembler() -> Path:
    """Return where triton keeps its disassembler of cubins, whether or not it is there."""
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def _read(sass: str) -> Iterator[Instruction]:
    for line in sass.splitlines():
        if found := INSTRUCTION.match(line):
            text = found[2]
            yield Instruction(int(found[1], 16), re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0], text)
