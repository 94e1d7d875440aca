"""Processes, and the layers that split over them."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

NOT_FOR_MEGATRON = ("wandb", "torch.utils.tensorboard")
"""Packages that Megatron imports where they are installed, 400 modules with what they import in turn, and we never hand
to it. A run's trackers import them where they are asked for."""


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Silence Megatron's notices at import that Transformer Engine and Apex, which are optional, are missing.

    Megatron also wraps its fusions in `torch.compile` as it is imported, which imports torch's compiler for seconds in
    every process; we call none of them, and they stay as they are written. What `NOT_FOR_MEGATRON` names is hidden.
    """
    hidden = dict.fromkeys(name for name in NOT_FOR_MEGATRON if name not in sys.modules)
    sys.modules.update(hidden)
    try:
        with warnings.catch_warnings(), patch("torch.compile", lambda function: function):
            warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
            yield
    finally:
        for name in hidden:
            del sys.modules[name]


with quiet_imports():
    import megatron.core  # noqa: F401 - imported here first, quietly
