"""What every test relies on: one thread, set before torch is imported, and no process group left at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
LONGEST = ("tests/slurm/", "tests/integration/test_copy_task.py", "tests/unit/ops/test_self_modifying_triton.py")
"""Tests that take minutes."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--march", help="compile the C++ of these tests for this processor, as x86-64-v2, not for ours")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no worker is left alone with it at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def processor(request: pytest.FixtureRequest) -> None:
    if march := request.config.getoption("--march"):
        from hopescale.ops.cpp import build

        build.FLAGS = tuple(f"-march={march}" if flag.startswith("-march=") else flag for flag in build.FLAGS)


@pytest.fixture(scope="session", autouse=True)
def end_of_process_group() -> Iterator[None]:
    yield
    if "torch" in sys.modules:
        from hopescale.parallel.process import stop

        stop()
