"""One training step over the micro batches of a global batch: forward, backward, norm, update."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hopescale.data.loader import Batch, Share
from hopescale.engine.schedule import Passes
from hopescale.observe.health import StepLimits
from hopescale.optim import Cadence, OuterOptimizer
from hopescale.optim.changes import WeightChanges
from hopescale.optim.gate import StepGate
from hopescale.parallel.host_copy import HostCopy
from hopescale.parallel.layers import IGNORED_TARGET
from hopescale.parallel.mesh import Mesh


@dataclass(frozen=True)
class Gradients:
    """Results of forward and backward, as the host has read them; equal on all ranks but for the last.

    Attributes:
        loss: Mean cross-entropy in nats over the step's targets.
        grad_norm: Global norm over the due parameters, before clipping.
        waiting_norm: A norm over the other parameters, whose gradients add up: finite if they are.
        level_norms: Norm of each due level.
        is_asked: Whether any rank asks all of them to talk.
        probe: Statistics of the memories on this rank, empty without a probe.
    """

    loss: float
    grad_norm: float
    waiting_norm: float
    level_norms: dict[str, float]
    is_asked: bool
    probe: dict[str, Tensor]


class Computed:
    """Results of forward and backward, before anything is changed, which the device may still compute.

    Args:
        values: Loss, whether any rank asks, norm over the due parameters, norm over the others, and norms of levels.
        levels: Names of the levels.
        probe: Statistics of the memories on this rank.
    """

    def __init__(self, values: Tensor, levels: Sequence[str], probe: dict[str, Tensor]):
        self.values, self._levels, self._probe = values, levels, probe
        self._copy = HostCopy(values)

    @property
    def grad_norm(self) -> Tensor:
        """The norm over the due parameters, on the device."""
        return self.values[2]

    def gate(self, limits: StepLimits) -> StepGate:
        """Return the gate of a step that is bad by `limits`, as the watch that set them finds it."""
        is_good = self.values[0].isfinite() & self.values[2:4].isfinite().all()
        for value, limit in ((self.values[0], limits.loss), (self.grad_norm, limits.grad_norm)):
            if limit is not None:
                is_good &= ~(value.double() - limit.base > limit.most)
        return StepGate(is_good)

    def read(self) -> Gradients:
        """Return the results; wait for them."""
        loss, asked, grad_norm, waiting_norm, *norms = self._copy.read()
        level_norms = dict(zip(self._levels, norms, strict=True))
        return Gradients(loss, grad_norm, waiting_norm, level_norms, asked > 0, self._probe)


class Engine:
    """Computes gradients and applies them; two calls, so that a bad step can be refused in between.

    Every rank calls the same methods in the same order, each with the micro batches of its replica. Neither call waits
    for the device: what they return does, when it is read.

    Args:
        passes: Forward and backward of the model.
        optimizer: Optimizer of this rank's parameters.
        levels: This rank's parameter names of each level of the continuum memory system; the levels of all ranks.
        device: Device of the parameters.
        share: Part of each sequence that this rank holds; None is all of it.
        cadences: Cadences of each level on all ranks; None is those on this one.
    """

    def __init__(
        self,
        passes: Passes,
        optimizer: OuterOptimizer,
        levels: Mapping[str, Sequence[str]],
        device: torch.device,
        share: Share | None = None,
        cadences: Mapping[str, Collection[Cadence]] | None = None,
    ):
        self.passes, self.optimizer, self.levels, self.device = passes, optimizer, levels, device
        self.share = share or Share()
        self.mesh: Mesh = optimizer.mesh
        own = {level: {optimizer.cadences[name] for name in names} for level, names in levels.items()}
        self.cadences = own if cadences is None else cadences

    @property
    def is_gated(self) -> bool:
        """Whether `update` takes limits: the same on all ranks."""
        is_late = any(cadence.lag for cadences in self.cadences.values() for cadence in cadences)
        return self.optimizer.is_gated and not is_late

    def gradients(
        self, step: int, batches: Sequence[Batch], *, probe: bool = False, ask: Callable[[], bool] = lambda: False
    ) -> Computed:
        """Run forward and backward over all micro batches of step `step`, counted from 1.

        Args:
            step: Step number, which decides which levels are due.
            batches: Micro batches of this replica, or this rank's share of them; each target of the step weighs the
                same, wherever it lies.
            probe: Whether to take statistics of the memories, from the first micro batch.
            ask: Function that tells, while the device computes, whether this rank asks all ranks to talk. The answers
                travel with loss and norms.
        """
        stats: dict[str, Tensor] = {}
        mean = _MeanOverTargets(num_targets(batches), self.device, self.mesh.dp_group)
        due, of_levels = self.optimizer.due(step), self._due_of_levels(step)
        in_levels = {name for names in of_levels.values() for name in names}
        apart = [[name for name in due if name not in in_levels], *of_levels.values()]
        self.optimizer.expect(apart)
        loss = self.passes.train(batches, mean, stats if probe else None)
        mean.wait()  # where no loss was computed
        for names in apart:
            self.optimizer.reduce(names)
        waiting = sorted(self.optimizer.parameters.keys() - due)
        self.optimizer.hold(waiting)
        sets = {"due": due, "waiting": waiting}
        sets |= {f"level {level}": names for level, names in of_levels.items()}
        asked = torch.full((), float(ask()), device=self.device)
        squares = self.optimizer.square_sums(sets)
        if (running := self.optimizer.running_squares(due)) is not None:
            squares[1] += running
        parts = torch.stack([self._of_last_stage(loss), asked, *squares])
        sums = _all_reduce(parts, self.mesh.world_group)
        return Computed(torch.cat([sums[:2], sums[2:].sqrt()]), list(of_levels), stats)

    def _due_of_levels(self, step: int) -> dict[str, list[str]]:
        """Return what is due here of each level that is due anywhere."""
        due = set(self.optimizer.due(step))
        levels = [
            level
            for level in self.levels
            if any(self.optimizer.is_due(cadence, step) for cadence in self.cadences[level])
        ]
        return {level: [name for name in self.levels[level] if name in due] for level in levels}

    def _of_last_stage(self, value: Tensor) -> Tensor:
        """Return this rank's part of a sum of a value of the last stage: tensor-parallel ranks hold the same."""
        return value * float(self.mesh.is_last_stage and self.mesh.tp_group.rank() == 0)

    def update(
        self, step: int, computed: Computed, *, measure: bool = False, limits: StepLimits | None = None
    ) -> WeightChanges:
        """Apply the gradients of step `step`.

        Args:
            step: Step number, counted from 1.
            computed: Results of the step, as `gradients` returned them.
            measure: Whether to measure the levels that are updated every step; slow ones are measured always.
            limits: Limits by which the step may be bad. A bad one then changes nothing and drops all gradients; when it
                is known, `OuterOptimizer.take_back` follows. None is a step that is known to be good.

        Returns:
            Root mean square of the change of each due level's weights that was measured.
        """
        gate = None if limits is None else computed.gate(limits)
        chosen = {
            level: names
            for level, names in self._due_of_levels(step).items()
            if measure or any(cadence.period > 1 for cadence in self.cadences[level])
        }
        before = {level: self.optimizer.masters(names) for level, names in chosen.items()}
        self.optimizer.step(step, computed.grad_norm, gate)
        return self.optimizer.change(chosen, before)

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Return the mean cross-entropy in nats over the targets of `batches`, without training.

        Args:
            batches: Micro batches, the same on every rank, each of which takes its own; the last may have fewer rows.
        """
        batches = list(batches)
        count = max(1, num_targets(batches))
        loss = self._of_last_stage(self.passes.evaluate(self._of_replica(batches)))
        return float(_all_reduce(loss, self.mesh.world_group)) / count

    def _of_replica(self, batches: list[Batch]) -> list[Batch]:
        """Return this rank's share of its replica's batches, which are as many as every other's, and all of one size.

        Nothing is counted in what fills them up.
        """
        replicas = self.mesh.num_replicas
        if self.mesh.dp_group.size() == self.mesh.pp_group.size() == 1:
            return batches
        unit = replicas * (self.mesh.pp_group.size() if self.mesh.virtual_stages > 1 else 1)
        empty = batches[0]._replace(targets=torch.full_like(batches[0].targets, IGNORED_TARGET))
        full = [_filled(batch, empty) for batch in batches] + [empty] * (-len(batches) % unit)
        return [batch.share(self.share) for batch in full[self.mesh.replica :: replicas]]


class _MeanOverTargets:
    """Divides a sum over targets by all targets of a step, whose number comes while the first forward pass runs.

    Weights that are on their way come before it in the same group: nobody waits for it earlier than for the head's.

    Args:
        count: Number of targets of this replica.
        device: Device of the losses.
        group: Replicas.
    """

    def __init__(self, count: int, device: torch.device, group: dist.ProcessGroup):
        self._count = torch.full((), count, device=device)
        self._work = dist.all_reduce(self._count, group=group, async_op=True) if group.size() > 1 else None

    def wait(self) -> None:
        """Wait for the number."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def __call__(self, total: Tensor) -> Tensor:
        """Return the mean."""
        self.wait()
        return total / self._count.clamp_min(1)


def _all_reduce(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    if group.size() > 1:
        dist.all_reduce(value, group=group)
    return value


def num_targets(batches: Iterable[Batch]) -> int:
    """Count the targets that the loss looks at."""
    return sum(int((batch.targets != IGNORED_TARGET).sum()) for batch in batches)


def _filled(batch: Batch, empty: Batch) -> Batch:
    rows = len(batch.tokens)
    parts = zip(batch, empty, strict=True)
    return Batch(*(None if part is None else torch.cat([part, rest[rows:]]) for part, rest in parts))
