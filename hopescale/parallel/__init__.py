"""Processes, and the layers that split over them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Silence what Megatron announces at import: that Transformer Engine and Apex, which are optional, are missing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
        yield


with quiet_imports():
    import megatron.core  # noqa: F401 - imported here first, quietly
