"""What every test relies on: one thread, set before torch is imported, and no process group left at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--march", help="compile the C++ of these tests for this processor, as x86-64-v2, not for ours")


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
