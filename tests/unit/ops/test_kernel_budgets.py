"""What the kernels cost on a GPU, counted in their machine code for sm_90 without one (docs/performance.md)."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch

from hopescale.cost.roofline import INSTRUCTIONS
from hopescale.ops.self_modifying import MemorySpec, Streams
from tests.support.machine_code import MachineCode, compile_kernel, disassembler

if TYPE_CHECKING:
    from hopescale.ops.self_modifying.triton.kernel_config import KernelConfig

INTEGERS = {"begin", "heads", "row_step", "tokens", "chunk_size", "slots", "numbers", "scratch_size"}
KEPT = {"kept", "kept_momenta", "states", "momenta", "replayed_states", "replayed_momenta"}
"""Arguments whose type is that of states that are kept."""


class Budget(NamedTuple):
    """What a kernel may cost.

    Warp instructions and barriers per chunk of 64 tokens, bytes of stack of a thread, MiB that a program's loads and
    stores move per chunk, in caches and beyond, and KiB of shared memory.
    """

    instructions: int
    barriers: int
    stack: int
    moved: float
    shared: int = 64


KERNELS = {
    "forward": "forward.self_modify_kernel",
    "backward": "backward.self_modify_back_kernel",
}
BUDGETS = {
    ("forward", "linear", 64): Budget(11_700, 260, 0, 1.4),
    ("forward", "normalised mlp", 64): Budget(44_000, 920, 0, 4.6),
    ("backward", "linear", 64): Budget(43_500, 1_300, 128, 6.3),
    ("backward", "normalised mlp", 64): Budget(137_000, 3_900, 128, 18.8),
    ("forward", "linear", 128): Budget(18_800, 620, 8, 4.2, 96),
    ("forward", "normalised mlp", 128): Budget(62_000, 1_680, 80, 12.4, 96),
    ("backward", "linear", 128): Budget(62_500, 2_420, 220, 14.2),
    ("backward", "normalised mlp", 128): Budget(172_000, 6_150, 340, 39.0),
}
ALWAYS = (("forward", "linear", 64), ("forward", "normalised mlp", 64))


def cases() -> list:
    return [pytest.param(*case, marks=() if case in ALWAYS else pytest.mark.nightly) for case in BUDGETS]


def compiled(
    name: str, memory: str, dim: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[MachineCode, KernelConfig]:
    """Compile a kernel for Hope's memories in heads of a width; return it and its config."""
    from hopescale.ops.self_modifying.triton.kernel_config import KernelConfig

    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    module, function = KERNELS[name].split(".")
    kernel = getattr(import_module(f"hopescale.ops.self_modifying.triton.{module}"), function)
    hidden = None if memory == "linear" else dim
    learning = {"objective": "l2", "own_target": True, "erase": True, "error_cap": None, "key_eps": 1e-2}
    learning["normalize_writes"] = memory.startswith("normalised")
    spec = MemorySpec(("mem", "k", "v"), ("eta", "alpha"), hidden, 64, eta_max=1.0, read="prefix", **learning)
    x = torch.zeros(1, 1, 256, dim)
    config = KernelConfig.of(Streams(x, x, x, *3 * [x[..., 0]]), spec, "bf16")
    kinds = {n: "i32" if n in INTEGERS else "*bf16" if n in KEPT else "*fp32" for n in kernel.arg_names}
    constants = {"CONFIG": config} | ({"KEEP": True} if "KEEP" in kernel.arg_names else {})
    kinds |= {"bounds": "*i64"} | dict.fromkeys(constants, "constexpr")
    code = compile_kernel(kernel, kinds, constants, config.warps, aligned=("numbers", "scratch_size"))
    return code, config


def in_a_chunk(name: str, numbers: int) -> tuple[list[float], int]:
    """Return what `MachineCode` asks for, for a chunk in the midst of a sequence, of which one in four is kept."""
    copy = numbers / 2048  # trips of a copy of weights, or of momenta
    return {
        "forward": ([copy, copy, 1, copy / 4, copy / 4, 0, copy, copy], 2),
        "backward": ([1, 2 * copy], 0),
    }[name]


def programs_at_a_time(code: MachineCode, warps: int) -> int:
    """Return for how many programs a multiprocessor has registers, which threads get by eights, and shared memory."""
    registers = -(-code.registers // 8) * 8
    return min(65_536 // (warps * 32 * registers), 228 * 1024 // (code.shared + 1024))


@pytest.mark.timeout(1800)
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (it exists for Linux only)")
@pytest.mark.parametrize(("name", "memory", "dim"), cases())
def test_kernels_stay_within_their_budgets(
    name: str, memory: str, dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not disassembler().exists():
        pytest.skip(f"triton has no {disassembler().name} here")
    budget = BUDGETS[name, memory, dim]
    code, config = compiled(name, memory, dim, tmp_path, monkeypatch)
    turn = in_a_chunk(name, config.size)
    counts, moved = code.executed(*turn), code.moved(*turn) * config.warps / 2**20
    cost = sum(counts.values()), counts["BAR"], code.stack, moved, code.shared / 1024
    assert all(mine <= most for mine, most in zip(cost, budget, strict=True)), (cost, budget)
    assert programs_at_a_time(code, config.warps) >= (2 if config.warps == 4 else 1), (code.registers, code.shared)
    assert counts["HGMMA"] > 0 and counts["HMMA"] == 0  # all products run on the tensor cores of a warp group


@pytest.mark.parametrize(("memory", "dim"), [(memory, dim) for name, memory, dim in BUDGETS if name == "forward"])
def test_the_plan_counts_what_kernels_execute(memory: str, dim: int):
    counted = INSTRUCTIONS["bf16", memory.removeprefix("normalised "), dim]
    replay = 3 / 4 * counted.forward  # of three chunks of four
    executed = {"forward": counted.forward, "backward": counted.backward - replay}
    for name, instructions in executed.items():
        budget = BUDGETS[name, memory, dim].instructions
        assert 0.95 * budget < instructions <= budget, (name, instructions, budget)
