"""Forward and backward over the micro batches of a step: a plain loop, or a pipeline (`pipeline.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from hopescale.data.loader import Batch
from hopescale.models import Model
from hopescale.parallel.layers import cross_entropy_sum

Probe = dict[str, Tensor]


class Passes(Protocol):
    """Runs a replica's model over micro batches."""

    def train(self, batches: Sequence[Batch], count: Tensor | int, probe: Probe | None) -> Tensor:
        """Run forward and backward with the sum of the cross-entropy in nats over `count`.

        Args:
            batches: Micro batches of one size.
            count: Number of targets that the loss is a mean over; a tensor on the device, so that nobody waits for it.
            probe: Dictionary to fill with statistics of the memories from the first micro batch.

        Returns:
            The loss, summed over the micro batches, on the last stage; 0 on others.
        """

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Return the summed cross-entropy in nats of micro batches of one size, on the last stage; 0 on others."""


class Loop:
    """All of the model in this process: one micro batch after the other.

    Args:
        model: The whole model.
        backward: Function that runs the backward pass of a loss.
        device: Device to which batches are moved.
    """

    def __init__(self, model: Model, backward: Callable[[Tensor], None], device: torch.device):
        self.model, self.backward, self.device = model, backward, device

    def train(self, batches: Sequence[Batch], count: Tensor | int, probe: Probe | None) -> Tensor:
        """Run forward and backward."""
        total = torch.zeros((), device=self.device)
        for index, batch in enumerate(batches):
            loss = self._loss(batch, probe if index == 0 else None) / count
            self.backward(loss)
            total += loss.detach()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Run forward."""
        return sum((self._loss(batch, None) for batch in batches), torch.zeros((), device=self.device))

    def _loss(self, batch: Batch, probe: Probe | None) -> Tensor:
        batch = batch.to(self.device)
        logits, _ = self.model(batch.tokens, document_ids=batch.document_ids, probe=probe)
        return cross_entropy_sum(logits, batch.targets, self.model.mesh)


def make_passes(
    slices: Sequence[Model], backward: Callable[[Tensor], None], seq_len: int, device: torch.device
) -> Passes:
    """Return the way to run this rank's slices of the model, in order; a pipeline runs `backward` by itself."""
    if slices[0].mesh.pp_group.size() == 1:
        return Loop(slices[0], backward, device)
    from hopescale.engine.pipeline import Pipeline

    weight = next(p for p in slices[0].parameters() if not p.spec.keep_fp32)
    return Pipeline(slices, seq_len, weight.dtype, device)
