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
