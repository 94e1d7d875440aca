"""The fused kernels around the memories without a GPU, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def test_kernels_equal_torch_in_the_interpreter():
    """In a process of its own, as Triton looks for `TRITON_INTERPRET` when it is imported."""
    command = [sys.executable, "-m", "pytest", "tests/gpu/test_fused.py", "-x"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


@pytest.mark.parametrize("name", ["_forward", "_backward"])
def test_streams_of_heads_compile_for_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The interpreter takes what the compiler refuses, and these kernels take tuples."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hopescale.ops.fused import streams

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, gates = getattr(streams, name), ("*fp32",) * 3
    constants = {"GATES": 3, "STATIC": 4, "SLICES": 3, "WIDTH": 2, "TAIL": False, "CUT": False, "SIZE": 16, "D": 16}
    constants |= {"tail": None, "first": None} | ({"ALL": 4} if name == "_backward" else {})
    sizes = ("tokens", "batch", "heads", "token_stride", "batch_stride", "head_stride", "slice_stride", "unit")
    kinds = dict.fromkeys(kernel.arg_names, "*fp32") | dict.fromkeys(sizes, "i32") | {"eps": "fp32"}
    kinds |= {part: gates for part in ("gate_weights", "gate_biases", "d_logits") if part in kinds}
    kinds |= ({"row_size": "i32"} if name == "_backward" else {}) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature=kinds, constexprs=constants)
    assert triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]
