"""Machine code of Triton kernels for a GPU that is not there: what they need, and what a walk over chunks executes.

The compiler, the assembler and the disassemblers come with the package triton. A kernel's loops are found in the code
as branches back. The line that each was made from says which loop of Triton's own representation it is, which knows
how often it runs. A loop from a number that the compiler does not know up to a constant turns once (`scratch.again`).
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
LINE = re.compile(r'## File "(?:[^"]*/)?([^"/]+)", line (\d+)')
PLACE = re.compile(r'^(#loc\d*) = loc\((?:"(?:[^"]*/)?([^"/]+)":(\d+):|(?:callsite|"\w+")\((#loc\d*))', re.MULTILINE)
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
        trips: Trips of each loop of the code, in order; None where they are known only at run time.
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
        """
        known, place = iter(trips), {line.address: n for n, line in enumerate(self.code)}
        spans = sorted(_spans(self.code, place, back=True))
        weights, fixed, others = [1.0] * len(self.code), [], []
        for (first, last), trip in zip(spans, self.trips, strict=True):
            (others if trip in (None, 1) else fixed).append((first, last, trip))
            trip = next(known) if trip is None else trip
            for n in range(first, last + 1):
                weights[n] *= trip
        for first, last in _spans(self.code, place, back=False):
            other = BRANCH.match(self.code[last].text)
            if last - first <= LONGEST_PREDICATED and other and not other[1] and other[2]:
                first, last = last + 1, place[int(other[2], 16)] - 1  # the `if` stands behind what is done without it
            inside = [trip for begin, end, trip in fixed if begin <= first and last <= end]
            if any(first <= begin and end <= last and 2 * (end - begin) > last - first for begin, end, _ in others):
                continue  # it leaves out a loop, whose trips are counted
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


def _trips(ttgir: str, code: list[Instruction], lines: Mapping[int, tuple[str, str]]) -> list[int | None]:
    """Return the trips of each loop of the code, from those of Triton's representation on the same line."""
    by_line: dict[tuple[str, str], int | None] = {}
    places = {found[1]: (found[2], found[3], found[4]) for found in PLACE.finditer(ttgir)}
    opened: list[int | None | str] = []
    for text in ttgir.splitlines():
        loop = LOOP.search(text)
        if text.lstrip().startswith("}") and opened:
            trips, where = opened.pop(), re.search(r"loc\((#loc\d*)\)", text)
            if trips != "" and where:
                file, line, callee = places[where[1]]
                while callee:
                    file, line, callee = places[callee]
                by_line[file, line] = trips
        if text.rstrip().endswith("{"):
            opened.append(_turns(*loop.groups()) if loop else "")
    place = {line.address: n for n, line in enumerate(code)}
    spans = sorted(_spans(code, place, back=True))
    found: list[tuple[str, str]] = []
    for first, last in spans:
        # The branch back is of the loop's line, or was joined with what comes before it; a body begins a line below.
        for n in (last, *range(first, last)):
            file, line = lines[code[n].address]
            above = file, str(int(line or 0) - 1)
            if (file, line) in by_line or (n < last and above in by_line):
                found.append((file, line) if (file, line) in by_line else above)
                break
        else:
            files = {lines[line.address][0] for line in code[first : last + 1]}
            nests = any(first < begin and end < last for begin, end in spans)
            found.append(_other(by_line, found, files, nests, code[first].address))
    return [by_line[where] for where in found]


def _other(
    by_line: Mapping[tuple[str, str], int | None],
    found: Sequence[tuple[str, str]],
    files: set[str],
    nests: bool,
    address: int,
) -> tuple[str, str]:
    """Return which loop it is whose body comes from other functions alone, from those `found` before it, in order.

    A loop around another one is in the file of what called it, the next after the last loop found there that turns more
    than once. One that has none in it is any loop of the files of its body, if these turn alike.
    """
    if nests:
        file, line = next(((file, line) for file, line in reversed(found) if file not in files), ("", "0"))
        below = [
            where for where, trips in by_line.items() if where[0] == file and int(where[1]) > int(line) and trips != 1
        ]
        if below:
            return min(below, key=lambda where: int(where[1]))
    alike = [where for where in by_line if where[0] in files]
    if len({by_line[where] for where in alike}) != 1:
        raise ValueError(f"no loop of the kernel is on the lines of that at {address:#x}")
    return alike[0]


def _turns(*bounds: str) -> int | None:
    """Return the trips of a loop by its bounds and step."""
    numbers = [CONSTANT.match(part) for part in bounds]
    first, last, step = (int(number[1]) if number else None for number in numbers)
    if None not in (first, last, step):
        return -(-(last - first) // step)
    return 1 if first is None and None not in (last, step) else None


def _lines(text: str) -> dict[int, tuple[str, str]]:
    """Map addresses of instructions to the file and the line that each was made from."""
    where, lines, begins = ("", ""), {}, True
    for line in text.splitlines():
        if found := LINE.search(line):
            if begins:  # the innermost of functions that are one in another comes first
                where, begins = (found[1], found[2]), False
        elif found := INSTRUCTION.match(line):
            lines[int(found[1], 16)], begins = where, True
    return lines


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
    reader = tool.with_name("nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
        lined = subprocess.run([reader, "-g", "-c", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = resources(compiled)
    code = list(_read(sass))
    trips = _trips(compiled.asm["ttgir"], code, _lines(lined))
    return MachineCode(registers, stack, compiled.metadata.shared, code, trips)


def resources(compiled: Any) -> tuple[int, int]:
    """Return how many registers a thread of a compiled kernel has, and how many bytes of local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [disassembler(), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return int(registers), int(stack)


def disassembler() -> Path:
    """Return where triton keeps its disassembler of cubins, whether or not it is there."""
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def _read(sass: str) -> Iterator[Instruction]:
    for line in sass.splitlines():
        if found := INSTRUCTION.match(line):
            text = found[2]
            yield Instruction(int(found[1], 16), re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0], text)
