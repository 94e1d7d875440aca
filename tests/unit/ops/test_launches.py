"""The way from a call to a launch without a GPU: Triton binds, specialises and compiles what recipes launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hopescale.config.schema import ModelConfig, SelfModifyingConfig
from hopescale.models.self_modifying import SelfModifying
from hopescale.ops.self_modifying import Streams
from hopescale.parallel.mesh import Mesh
from tests.support.launches import noted_launches
from tests.support.machine_code import disassembler, resources

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed (it exists for Linux only)"
)
SHARED = 227 * 1024
"""Bytes of shared memory that a program can have on an H100."""
STATIC = {"adaptive": (), "targets": "value", "memory": "linear", "objective": "dot"}
ALL = ["start.move_start_kernel", "forward.self_modify_kernel", "replay.replay_kernel"]
ALL += ["backward.self_modify_back_kernel", ALL[0]]
CASES = {
    "static memories": (90, "bf16", STATIC),
    "MLPs, Ampere": (80, "tf32x3", {"adaptive": (), "momentum": False, "error_cap": 1.0, "normalize_writes": True}),
    "linear memories": (90, "bf16", {"memory": "linear", "adaptive": ("eta",)}),
}
NIGHTLY = ("linear memories",)


def run_memories(
    config: SelfModifyingConfig, products: str, *, heads: int, tokens: int, rows: int = 1, grad: bool = True
) -> None:
    """Run memories that begin with learned weights forward, and back."""
    from hopescale.ops.self_modifying.triton.function import self_modifying_triton

    model = ModelConfig(d_model=8, num_heads=heads, head_dim=16, mixers={"hope": config})
    mixer = SelfModifying(model, config, out_std=0.3, mesh=Mesh.alone(), backend="torch")
    x = torch.ones(rows, heads, tokens, 16, requires_grad=True)
    gates = [x[..., 0].contiguous() if there else None for there in (True, config.retention, config.momentum)]
    start = mixer.banks["memory"].start(config.momentum)
    with torch.set_grad_enabled(grad):
        output = self_modifying_triton(Streams(x, x, x, *gates), start, mixer.spec, products=products)
    if grad:
        output.y.sum().backward()


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.nightly if case in NIGHTLY else ()) for case in CASES]
)
def test_memories_reach_a_gpu_and_are_compiled_once_for_all_lengths(case: str, tmp_path: Path):
    capability, products, changes = CASES[case]
    config = replace(SelfModifyingConfig(chunk_size=4), **changes)
    with noted_launches(tmp_path, capability) as launches:
        run_memories(config, products, heads=1, tokens=20)
        first = list(launches)
        # Triton has code of its own for numbers that are 1 and for multiples of 16, unless a kernel says otherwise.
        run_memories(config, products, heads=16, tokens=60)
        run_memories(config, products, heads=3, tokens=256, rows=2)
    assert [each.kernel for each in launches] == 3 * ALL
    kernels = [launches[n + 1 : n + 4] for n in (0, 5, 10)]
    assert [each.grid for each in kernels[0]] == [(1, 1), (1, 2), (1, 1)]
    assert [each.grid for each in kernels[1]] == [(16, 1), (16, 4), (16, 1)]
    assert [each.grid for each in kernels[2]] == [(6, 1), (6, 16), (6, 1)]
    for other in kernels[1:]:
        assert [each.compiled for each in other] == [each.compiled for each in kernels[0]]
    assert all(each.compiled.asm["cubin"] and each.compiled.metadata.shared <= SHARED for each in first)


def test_memories_without_gradients_keep_nothing(tmp_path: Path):
    config = replace(SelfModifyingConfig(chunk_size=4), adaptive=("eta",), read="inclusive", normalize_writes=True)
    with noted_launches(tmp_path, 80) as launches:
        run_memories(config, "tf32x3", heads=1, tokens=20, grad=False)
    assert [each.kernel for each in launches] == ALL[:2]
    assert launches[1].compiled.asm["cubin"]


def norm(kind: torch.dtype, grad: Callable[..., Tensor]) -> Tensor:
    from hopescale.ops.fused.norm import add_rms_norm

    total, y = add_rms_norm(grad(3, 2048, kind=kind), grad(3, 2048, kind=kind), grad(2048), 1e-5)
    return total.sum() + y.sum()


def levels(kind: torch.dtype, grad: Callable[..., Tensor]) -> Tensor:
    from hopescale.ops.fused.swiglu import swiglu

    return swiglu(*(grad(rows, 7, kind=kind) for rows in (5, 1024, 1024))).sum()


def streams(kind: torch.dtype, grad: Callable[..., Tensor]) -> Tensor:
    from hopescale.ops.fused.streams import head_streams_and_gates

    gates = [(None, grad(2)), (None, grad(2)), (grad(2, 64), grad(2))]  # as of Hope: memories say two of the gates
    mixed, filters = grad(70, 1, 2, 4, 64, kind=kind), grad(2 * 3 * 64, 4, kind=kind)
    found, logits, _, _ = head_streams_and_gates(mixed, filters, None, (True, False, True), gates)
    return sum(x.sum() for x in (*found, *logits))


def answers(kind: torch.dtype, grad: Callable[..., Tensor]) -> Tensor:
    from hopescale.ops.fused.answers import gated_answers

    return gated_answers(grad(1, 2, 70, 64), grad(70, 1, 2, 64, kind=kind), grad(2, 64), 1e-5, kind).sum()


FUSED = {
    "norm": (norm, 32, 48),
    "swiglu": (levels, 32, 32),
    "streams": (streams, 70, 128),
    "answers": (answers, 52, 80),
}
"""Functions that launch the fused kernels, and the most registers of a thread forward and backward."""


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_fused_kernels_reach_a_gpu_and_need_few_registers(name: str, kind: torch.dtype, tmp_path: Path):
    function, *most = FUSED[name]

    def grad(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.ones(shape, dtype=kind, requires_grad=True)

    with noted_launches(tmp_path) as launches:
        function(kind, grad).backward()
    assert [each.kernel for each in launches] == [f"{name}._forward", f"{name}._backward"]
    assert all(min(each.grid) > 0 and each.compiled.metadata.shared <= SHARED for each in launches)
    if not disassembler().exists():
        pytest.skip(f"triton has no {disassembler().name} here")
    found = [resources(each.compiled) for each in launches]
    assert max(stack for _, stack in found) <= (8 if kind == torch.float32 and name == "streams" else 0)
    assert all(registers <= limit for (registers, _), limit in zip(found, most, strict=True)), found
