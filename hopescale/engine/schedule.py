"""Forward and backward over the micro batches of a step: a plain loop, or a pipeline (`pipeline.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hopescale.data.loader import Batch
from hopescale.engine.segments import Mean, Probe, Segments
from hopescale.models import Model

IN_FLIGHT = 2
"""Micro batches that ranks which share sequences begin before they turn back: they wait for one another once for all of
them, and keep the activations of all."""


class Passes(Protocol):
    """Runs a replica's model over micro batches."""

    def train(self, batches: Sequence[Batch], mean: Mean, probe: Probe | None) -> Tensor:
        """Run forward and backward with the mean of the cross-entropy in nats.

        Args:
            batches: Micro batches of one size.
            mean: Function that divides a sum over targets by the targets of the step.
            probe: Dictionary to fill with statistics of the memories from the first micro batch.

        Returns:
            The loss, summed over the micro batches, on the last stage; 0 on others.
        """

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Return the summed cross-entropy in nats of micro batches of one size, on the last stage; 0 on others."""


class Backward(Protocol):
    """Runs the backward pass of a loss."""

    def __call__(self, loss: Tensor, *, is_last: bool) -> None:
        """Run it; `is_last` tells that the step has no other after it."""


def plain_backward(loss: Tensor, *, is_last: bool) -> None:
    """Run the backward pass of a loss that no optimizer waits for."""
    loss.backward()


class Loop:
    """All of the model in this process: one micro batch after the other.

    Args:
        model: The whole model.
        backward: Function that runs the backward pass of a loss.
        segments: Pieces in which micro batches are run.
        device: Device to which batches are moved.
    """

    def __init__(self, model: Model, backward: Backward, segments: Segments, device: torch.device):
        self.model, self.backward, self.segments, self.device = model, backward, segments, device
        self.in_flight = IN_FLIGHT if segments.relay is not None else 1

    def train(self, batches: Sequence[Batch], mean: Mean, probe: Probe | None) -> Tensor:
        """Run forward and backward."""
        total = torch.zeros((), device=self.device)
        for first in range(0, len(batches), self.in_flight):
            losses = [
                mean(self._loss(batch, None if first or place else probe))
                for place, batch in enumerate(batches[first : first + self.in_flight])
            ]
            for place, loss in enumerate(losses, first + 1):
                self.backward(loss, is_last=place == len(batches))
                total += loss.detach()
            self.segments.settle()
        return total

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """Run forward."""
        total = torch.zeros((), device=self.device)
        for batch in batches:
            total += self._loss(batch, None)
            self.segments.settle()
        return total

    def _loss(self, batch: Batch, probe: Probe | None) -> Tensor:
        return self.segments.run(self.model, batch.to(self.device), None, probe)


def make_passes(
    slices: Sequence[Model],
    backward: Backward,
    seq_len: int,
    device: torch.device,
    *,
    segments: int = 1,
) -> Passes:
    """Return the way to run this rank's slices of the model, in order; a pipeline runs `backward` by itself.

    Args:
        slices: Slices of the model.
        backward: Function that runs the backward pass of a loss.
        seq_len: Tokens per sequence, of all ranks that share it.
        device: Device to which batches are moved.
        segments: Pieces into which this rank's tokens of a sequence are cut.
    """
    pieces = Segments(slices[0].mesh, segments)
    if slices[0].mesh.pp_group.size() == 1:
        return Loop(slices[0], backward, pieces, device)
    from hopescale.engine.pipeline import Pipeline

    weight = next(p for p in slices[0].parameters() if not p.spec.keep_fp32)
    return Pipeline(slices, seq_len, weight.dtype, pieces, device)
