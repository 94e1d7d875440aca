"""One training step over the micro batches of a global batch: forward, backward, norm, update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hopescale.data.loader import Batch
from hopescale.engine.schedule import Passes
from hopescale.optim import OuterOptimizer
from hopescale.parallel.layers import IGNORED_TARGET
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.traffic import Traffic


@dataclass(frozen=True)
class Gradients:
    """What forward and backward found, before anything is changed; equal on all ranks but for the last two.

    Attributes:
        loss: Mean cross-entropy in nats over the step's targets.
        grad_norm: Global norm over the due parameters, before clipping.
        waiting_norm: Finite if the gradients of the others are, which accumulate on.
        level_norms: Of each due level.
        level_bytes: What this rank handed over to sum the gradients of each due level over replicas.
        probe: Statistics of the memories on this rank, if asked for.
    """

    loss: float
    grad_norm: float
    waiting_norm: float
    level_norms: dict[str, float]
    level_bytes: dict[str, int]
    probe: dict[str, Tensor]


class Engine:
    """Computes gradients and applies them; two calls, so that a bad step can be refused in between.

    Every rank calls the same methods in the same order, each with the micro batches of its replica.

    Args:
        passes: Runs the model.
        optimizer: Over this rank's parameters.
        levels: This rank's parameter names of each level of the continuum memory system; the levels of all ranks.
        traffic: Counts what is sent.
        device: Of the parameters.
    """

    def __init__(
        self,
        passes: Passes,
        optimizer: OuterOptimizer,
        levels: Mapping[str, Sequence[str]],
        traffic: Traffic,
        device: torch.device,
    ):
        self.passes, self.optimizer, self.levels = passes, optimizer, levels
        self.traffic, self.device = traffic, device
        self.mesh: Mesh = optimizer.mesh

    def gradients(self, step: int, batches: Sequence[Batch], *, probe: bool = False) -> Gradients:
        """Run forward and backward over all micro batches of step `step`, counted from 1.

        Args:
            step: Decides which levels are due.
            batches: Micro batches of this replica; each target of the step weighs the same, wherever it lies.
            probe: Whether to gather statistics of the memories, from the first micro batch.
        """
        seen: dict[str, Tensor] = {}
        count = self._over(self.mesh.dp_group, torch.tensor(num_targets(batches), device=self.device))
        loss = self.passes.train(batches, max(1, int(count)), seen if probe else None)
        due = self.optimizer.due(step)
        level_bytes = self._reduce(due)
        waiting = sorted(self.optimizer.parameters.keys() - due)
        sets = {"due": due, "waiting": waiting}
        sets |= {f"level {level}": self.levels[level] for level in level_bytes}
        norms = self.optimizer.grad_norms(sets)
        values = torch.stack([self._once(loss), *norms.values()]).tolist()
        grad_norm, waiting_norm, *level_norms = values[1:]
        return Gradients(
            values[0], grad_norm, waiting_norm, dict(zip(level_bytes, level_norms, strict=True)), level_bytes, seen
        )

    def _reduce(self, due: Sequence[str]) -> dict[str, int]:
        """Sum gradients over replicas, level by level; return the bytes handed over for each due level."""
        chosen = {level: [name for name in names if name in set(due)] for level, names in self.levels.items()}
        chosen = {level: names for level, names in chosen.items() if names}
        in_levels = {name for names in chosen.values() for name in names}
        self.optimizer.reduce([name for name in due if name not in in_levels])
        sent = {}
        for level, names in chosen.items():
            before = self.traffic.bytes["dp"]
            self.optimizer.reduce(names)
            sent[level] = self.traffic.bytes["dp"] - before
        return sent

    def _once(self, value: Tensor) -> Tensor:
        """Sum a value of the last stage over replicas; tensor-parallel ranks hold the same."""
        counted = self.mesh.is_last_stage and self.mesh.tp_group.rank() == 0
        return self._over(self.mesh.world_group, value * float(counted))

    def _over(self, group: dist.ProcessGroup, value: Tensor) -> Tensor:
        if group.size() > 1:
            dist.all_reduce(value, group=group)
        return value

    def update(self, step: int, gradients: Gradients, *, measure: bool = False) -> dict[str, float]:
        """Apply the gradients of step `step`.

        Args:
            measure: Whether to measure the levels that are updated every step; slow ones are measured always.

        Returns:
            Root mean square of the change of each due level's weights that was measured.
        """
        chosen = {
            level: self.levels[level]
            for level in gradients.level_norms
            if measure or self.optimizer.cadences[self.levels[level][0]].period > 1
        }
        before = {level: self.optimizer.masters(names) for level, names in chosen.items()}
        self.optimizer.step(step, torch.tensor(gradients.grad_norm, device=self.device))
        return self.optimizer.change(chosen, before)

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Return the mean cross-entropy in nats over the targets of `batches`, without training.

        Args:
            batches: The same on every rank, which shares them out; the last may have fewer rows.
        """
        batches = list(batches)
        count = max(1, num_targets(batches))
        return float(self._once(self.passes.evaluate(self._share(batches)))) / count

    def _share(self, batches: list[Batch]) -> list[Batch]:
        """Return this replica's batches, as many as every other's, all of one size: nothing is counted in the rest."""
        if self.mesh.dp_group.size() == self.mesh.pp_group.size() == 1:
            return batches
        unit = self.mesh.dp_group.size() * (self.mesh.pp_group.size() if self.mesh.virtual_stages > 1 else 1)
        empty = batches[0]._replace(targets=torch.full_like(batches[0].targets, IGNORED_TARGET))
        full = [_filled(batch, empty) for batch in batches] + [empty] * (-len(batches) % unit)
        return full[self.mesh.dp_group.rank() :: self.mesh.dp_group.size()]


def num_targets(batches: Iterable[Batch]) -> int:
    """Count the targets that the loss looks at."""
    return sum(int((batch.targets != IGNORED_TARGET).sum()) for batch in batches)


def _filled(batch: Batch, empty: Batch) -> Batch:
    rows = len(batch.tokens)
    return Batch(*(torch.cat([part, rest[rows:]]) for part, rest in zip(batch, empty, strict=True)))
