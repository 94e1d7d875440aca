"""Variables of the process that libraries read when a group is made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def variable_set(name: str) -> Iterator[None]:
    """Set a variable of the process to 1 inside; its former value comes back."""
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
