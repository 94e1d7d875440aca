"""The fused self-modifying kernels without a GPU: results in the interpreter, code from the compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from hopescale.ops.self_modifying import MemorySpec, Streams

if TYPE_CHECKING:
    from hopescale.ops.self_modifying.triton.kernel_config import KernelConfig

ROOT = Path(__file__).parents[3]
INTEGERS = {"begin", "heads", "row_step", "tokens", "chunk_size", "slots", "numbers", "scratch_size"}
KERNELS = {"forward.self_modify_kernel": True, "backward.self_modify_back_kernel": False}
"""Kernels, and whether to compile them for momentum and for a gate memory: they double the code, and more."""

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed (it exists for Linux only)"
)


@pytest.mark.parametrize("tests", ["variant", "static", "not variant and not static"])
def test_kernels_equal_the_loop_in_the_interpreter(tests: str):
    """In a process of its own, as Triton looks for `TRITON_INTERPRET` when it is imported."""
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_self_modifying_triton.py", "-x", "-k", tests]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_importing_the_memories_imports_no_triton():
    code = "import sys, hopescale.ops.self_modifying as ops; sys.exit(f'{ops.__name__}.triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def make_config(*, whole: bool) -> KernelConfig:
    """Make a config of an MLP memory, `whole` with a gate memory and momentum."""
    from hopescale.ops.self_modifying.triton.kernel_config import KernelConfig

    spec = MemorySpec(
        vector_memories=("mem",),
        gate_memories=("eta",) if whole else (),
        hidden=16,
        chunk_size=16,
        objective="l2",
        own_target=True,
        erase=True,
        error_cap=1.0,
        key_eps=1e-2,
        eta_max=1.0,
        read="inclusive",
        normalize_writes=True,
    )
    tokens = torch.zeros(1, 1, 16, 16)
    gate = tokens[..., 0]
    streams = Streams(tokens, tokens, tokens, gate, gate, gate if whole else None)
    return KernelConfig.of(streams, spec, "tf32x3")


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module, function = name.split(".")
    kernel = getattr(import_module(f"hopescale.ops.self_modifying.triton.{module}"), function)
    constants = {"CONFIG": make_config(whole=KERNELS[name])} | ({"KEEP": False} if KERNELS[name] else {})
    kinds = {name: "i32" if name in INTEGERS else "*fp32" for name in kernel.arg_names} | {
        "bounds": "*i64",
        **dict.fromkeys(constants, "constexpr"),
    }
    source = ASTSource(kernel, signature=kinds, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_stages": 1}).asm["cubin"]


@pytest.mark.parametrize("back", [False, True])
def test_the_kernel_that_packs_learned_weights_compiles_for_a_gpu(
    back: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hopescale.ops.self_modifying.triton.start import move_start_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"CONFIG": make_config(whole=True), "SIZE": 16, "BACK": back}
    kinds = {"first": ("*fp32",) * 2, "second": ("*fp32",) * 2, "packed": "*fp32", "momentum": "*fp32"}
    kinds |= {"documents": "i32", "heads": "i32", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(move_start_kernel, signature=kinds, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]
