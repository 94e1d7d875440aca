"""Processes, and the layers that split over them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Silence what Megatron announces at import: that Transformer Engine and Apex, which are optional, are missing.

    Megatron also wraps its fusions in `torch.compile` as it is imported, which imports torch's compiler for seconds in
    every process; we call none of them, and they stay as they are written.
    """
    with warnings.catch_warnings(), patch("torch.compile", lambda function: function):
        warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
        yield


with quiet_imports():
    import megatron.core  # noqa: F401 - imported here first, quietly
