"""Activations that are computed again in the backward pass instead of kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(run: Callable[..., Any], *inputs: Any, probe: dict[str, Tensor] | None) -> Any:
    """Return `run(*inputs, probe)`; of its activations only the inputs are kept for the backward pass.

    `run` draws no random numbers. It fills `probe` once: computed again, it is given None.
    """
    if not torch.is_grad_enabled():
        return run(*inputs, probe)
    probes = iter([probe])

    def once_probed(*again: Any) -> Any:
        return run(*again, next(probes, None))

    return checkpoint(once_probed, *inputs, use_reentrant=False, preserve_rng_state=False)
