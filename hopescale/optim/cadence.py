"""When a parameter is updated, and the gradients it accumulates until then; `OuterOptimizer.step` updates it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from hopescale.config.model_shape import phases
from hopescale.config.schema import ModelConfig
from hopescale.cost.updates import Wire


@dataclass(frozen=True)
class Cadence:
    """Outer cadence of a parameter: one update every `period` steps (Nested Learning, Eq. 71).

    Attributes:
        period: Optimizer steps between two updates.
        phase: Shift; a period ends with steps `s` (counted from 1) with `(s + phase) % period == 0`.
        lag: Steps from the end of a period to the update with its sum, below `period`.
        wire: Type in which replicas send the sum.
    """

    period: int = 1
    phase: int = 0
    lag: int = 0
    wire: Wire = "fp32"

    @property
    def moves(self) -> bool:
        """Whether a sum leaves the accumulator when it is sent."""
        return self.lag > 0 or self.wire != "fp32"

    def ends(self, step: int) -> bool:
        """Tell whether a period ends with step `step`."""
        return (step + self.phase) % self.period == 0

    def is_due(self, step: int) -> bool:
        """Tell whether step `step` updates the parameter."""
        return step > self.lag and self.ends(step - self.lag)

    def is_on_its_way(self, step: int, since: int = 0) -> bool:
        """Tell whether a sum of a period that ended after step `since` waits for its update when step `step` is over.

        The period may have ended with step `step` itself.
        """
        return any(self.ends(end) for end in range(max(1, since + 1, step - self.lag + 1), step + 1))

    def updates(self, step: int) -> int:
        """Count the updates of steps 1 to `step`."""
        return (max(0, step - self.lag) + self.phase) // self.period - self.phase // self.period


def cadences_of_level(model: ModelConfig, name: str) -> dict[int, Cadence]:
    """Return the cadence of a level in each block that has it."""
    level = model.cms.levels[name]
    period, lag, wire = level.update_every_steps, level.lag, level.wire
    return {number: Cadence(period, phase, lag, wire) for number, phase in phases(model, name).items()}


class Accumulator:
    """Sum of a parameter's gradients since its last update, in float32.

    Between updates of a slow level the sum is state of the run: it is saved and restored.

    Args:
        parameter: Parameter that has the gradient.
        cadence: Cadence at which the sum is used.
        buffer: Float32 zeros in which to accumulate; None makes room, for a fast parameter in each step anew.
        wake: Function to call before the buffer is used, if its memory may be free in between.

    Attributes:
        total: The sum, None if there is none yet.
        buffer: Room in which the next sum is made; None if it is made anew.
    """

    def __init__(
        self,
        parameter: Tensor,
        cadence: Cadence,
        buffer: Tensor | None = None,
        wake: Callable[[], None] = lambda: None,
    ):
        self.parameter, self.cadence, self._wake = parameter, cadence, wake
        self.persists = cadence.period > 1
        if self.persists and buffer is None:
            buffer = torch.zeros_like(parameter, dtype=torch.float32)
        self.total = self.buffer = buffer

    def take(self, _: Tensor | None = None) -> None:
        """Add the parameter's gradient to the sum and clear it: a hook for after each backward pass."""
        gradient = self.parameter.grad
        if gradient is None:
            return
        self.parameter.grad = None
        self._wake()
        if self.total is None:
            self.total = gradient.float()
        else:
            self.total.add_(gradient)

    def accumulated_grad(self) -> Tensor:
        """Return the sum so far: zeros if there was no gradient."""
        self._wake()
        if self.total is None:
            self.total = torch.zeros_like(self.parameter, dtype=torch.float32)
        return self.total

    def clear(self) -> None:
        """Begin a new period."""
        begin_periods([self])


def begin_periods(accumulators: Iterable[Accumulator]) -> None:
    """Begin a new period of accumulators, all at once."""
    lasting = []
    for each in accumulators:
        each.total = each.buffer
        if each.buffer is not None:
            lasting.append(each.buffer)
    if lasting:
        torch._foreach_zero_(lasting)
