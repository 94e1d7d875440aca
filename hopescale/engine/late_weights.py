"""Weights that come from other replicas while the next forward pass runs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from hopescale.models import Model
from hopescale.models.block import Block
from hopescale.optim import OuterOptimizer


def wait_in_forward(model: Model, optimizer: OuterOptimizer) -> None:
    """Let each part of a whole model wait for its own weights before it runs, and updates for none of them.

    Args:
        model: The model, whose blocks, embedding, norm and head run one after the other.
        optimizer: Optimizer of its parameters.
    """
    for name, module in _parts(model):
        names = [f"{name}.{inner}" for inner, _ in module.named_parameters()]
        optimizer.defer(names)
        module.register_forward_pre_hook(partial(_settle, optimizer, names))


def _settle(optimizer: OuterOptimizer, names: list[str], *_: Any) -> None:
    optimizer.settle(names)


def _parts(model: Model) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, Block):
            yield name, module
    for name, child in model.named_children():
        if not any(isinstance(module, Block) for module in child.modules()):
            yield name, child
