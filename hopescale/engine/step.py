"""One training step over the micro batches of a global batch: forward, backward, norm, update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hopescale.data.loader import Batch
from hopescale.models import Model
from hopescale.optim import OuterOptimizer
from hopescale.parallel.layers import IGNORED_TARGET, cross_entropy_sum


@dataclass(frozen=True)
class Gradients:
    """What forward and backward found, before anything is changed.

    Attributes:
        loss: Mean cross-entropy in nats over the step's targets.
        grad_norm: Global norm over the due parameters, before clipping.
        waiting_norm: The same over the others, which gather on; only looked at to be finite.
        level_norms: Of each due level.
        probe: Statistics of the memories, if asked for.
    """

    loss: float
    grad_norm: Tensor
    waiting_norm: Tensor
    level_norms: dict[str, Tensor]
    probe: dict[str, Tensor]


class Engine:
    """Computes gradients and applies them; two calls, so that a bad step can be refused in between.

    Args:
        model: Its parameters are trained in place.
        optimizer: Over the model's parameters.
        levels: Parameter names of each level of the continuum memory system.
        device: Where batches are moved.
    """

    def __init__(self, model: Model, optimizer: OuterOptimizer, levels: dict[str, list[str]], device: torch.device):
        self.model, self.optimizer, self.levels, self.device = model, optimizer, levels, device

    def gradients(self, step: int, batches: Sequence[Batch], *, probe: bool = False) -> Gradients:
        """Run forward and backward over all micro batches of step `step`, counted from 1.

        Args:
            step: Decides which levels are due.
            batches: Micro batches; each target weighs the same, wherever it lies.
            probe: Whether to gather statistics of the memories, from the first micro batch.
        """
        count = max(1, sum(int((batch.targets != IGNORED_TARGET).sum()) for batch in batches))
        seen: dict[str, Tensor] | None = {} if probe else None
        total = torch.zeros((), device=self.device)
        for index, batch in enumerate(batches):
            loss = self._loss_sum(batch, seen if index == 0 else None) / count
            loss.backward()
            self.optimizer.take()
            total += loss.detach()
        due = dict.fromkeys(self.optimizer.due(step))
        waiting = [name for name in self.optimizer.parameters if name not in due]
        norm = self.optimizer.grad_norm
        level_norms = {level: norm(names) for level, names in self.levels.items() if names[0] in due}
        return Gradients(total.item(), norm(due), norm(waiting), level_norms, seen or {})

    def _loss_sum(self, batch: Batch, probe: dict[str, Tensor] | None = None) -> Tensor:
        tokens, targets = batch.tokens.to(self.device), batch.targets.to(self.device)
        documents = batch.document_ids.to(self.device)
        logits, _ = self.model(tokens, document_ids=documents, probe=probe)
        return cross_entropy_sum(logits, targets, self.model.mesh)

    def update(self, step: int, gradients: Gradients, *, measure: bool = False) -> dict[str, float]:
        """Apply the gradients of step `step`.

        Args:
            measure: Whether to measure the levels that are updated every step; slow ones are measured always.

        Returns:
            Root mean square of the change of each due level's weights that was measured.
        """
        chosen = {
            level: [self.optimizer.masters[name] for name in self.levels[level]]
            for level in gradients.level_norms
            if measure or self.optimizer.accumulators[self.levels[level][0]].kept
        }
        before = {level: [master.detach().clone() for master in masters] for level, masters in chosen.items()}
        self.optimizer.step(step, gradients.grad_norm)
        return {level: _change(before[level], masters) for level, masters in chosen.items()}

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Return the mean cross-entropy in nats over the targets of `batches`, without training."""
        total, count = 0.0, 0
        for batch in batches:
            total += self._loss_sum(batch).item()
            count += int((batch.targets != IGNORED_TARGET).sum())
        return total / max(1, count)


def _change(before: list[Tensor], after: list[Tensor]) -> float:
    square = sum(float((b - a.detach()).square().sum()) for b, a in zip(before, after, strict=True))
    return (square / sum(tensor.numel() for tensor in before)) ** 0.5
