"""The Triton kernels without a GPU: results in the interpreter, code from the compiler, and who may use them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from hopescale.ops.delta_rule import delta_rule

ROOT = Path(__file__).parents[3]
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed (it exists for Linux only)"
)

POINTERS_16_BIT = {"k", "u", "q", "output", "d_output", "dk", "du", "dq"}
INTEGERS = {"tokens", "heads", "chunk"}
SIZES = {"D": 16, "DO": 32, "BD": 16, "BV": 16, "C": 16, "DOUBLINGS": 4}
SETTINGS = SIZES | {"ERASE": True, "READ": "inclusive", "PRECISION": "tf32x3"}
KERNELS = (
    "forward.prepare_kernel",
    "forward.states_kernel",
    "forward.read_kernel",
    "backward.read_back_kernel",
    "backward.states_back_kernel",
    "gradients.values_kernel",
    "gradients.keys_kernel",
    "gradients.queries_kernel",
    "gradients.gates_kernel",
)


@needs_triton
def test_kernels_equal_the_token_loop_in_the_interpreter():
    """In a process of its own, as Triton looks for `TRITON_INTERPRET` when it is imported."""
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_delta_rule_triton.py", "-x"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@needs_triton
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    module, function = name.split(".")
    kernel = getattr(import_module(f"hopescale.ops.delta_rule.triton.{module}"), function)
    settings = {key: value for key, value in (SETTINGS).items() if key in kernel.arg_names}
    kinds = {}
    for argument in kernel.arg_names:
        pointer = "*bf16" if argument in POINTERS_16_BIT else "*fp32"
        kinds[argument] = "constexpr" if argument in settings else "i32" if argument in INTEGERS else pointer
    source = ASTSource(kernel, signature=kinds, constexprs=settings)
    assert triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_stages": 1}).asm["cubin"]


def test_triton_without_a_gpu_is_one_clear_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    tokens, state = torch.zeros(1, 3, 2, 16), torch.zeros(1, 2, 16, 16)
    inputs = {"k": tokens, "u": tokens, "eta": tokens[..., 0], "alpha": tokens[..., 0], "state": state}
    with pytest.raises(ValueError, match="backend is 'triton', but (triton is not installed|the kernels need)"):
        delta_rule(**inputs, backend="triton")
    with pytest.raises(ValueError, match="backend is 'cuda', not one of torch, triton"):
        delta_rule(**inputs, backend="cuda")
    assert torch.equal(delta_rule(**inputs, backend="torch").state, state)


def test_importing_the_delta_rule_imports_no_triton():
    code = "import sys, hopescale.ops; sys.exit('hopescale.ops.delta_rule.triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
