"""What every test relies on: one thread, set before torch is imported, and no process group left at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def end_of_process_group() -> Iterator[None]:
    yield
    if "torch" in sys.modules:
        from hopescale.parallel.process import stop

        stop()
