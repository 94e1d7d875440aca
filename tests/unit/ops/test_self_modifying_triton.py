"""The fused self-modifying kernels without a GPU, in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="triton is not installed (it exists for Linux only)"
)


@pytest.mark.parametrize("tests", ["variant", "static", "not variant and not static"])
def test_kernels_equal_the_loop_in_the_interpreter(tests: str):
    """In a process of its own, as Triton looks for `TRITON_INTERPRET` when it is imported."""
    files = ["tests/gpu/test_self_modifying_triton.py", "tests/gpu/test_barriers.py"]
    command = [sys.executable, "-m", "pytest", *files, "-x", "-k", tests]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_importing_the_memories_imports_no_triton():
    code = "import sys, hopescale.ops.self_modifying as ops; sys.exit(f'{ops.__name__}.triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
