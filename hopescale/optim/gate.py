"""Steps that may turn out bad when their update has begun: they change nothing then, and no host waits to know."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class StepGate:
    """Lets through what a good step does to tensors, and nothing of what a bad one does.

    Numbers are never multiplied to drop them, as nan times 0 is nan: their bits are, as integers.

    Args:
        is_good: Whether the step is good, 0-dim bool on the device of the tensors.
    """

    def __init__(self, is_good: Tensor):
        self._is_good = is_good
        self._keeps = is_good.to(torch.int32)
        self._drops = 1 - self._keeps
        self._chosen: dict[tuple[float, float], Tensor] = {}

    def choose(self, good: float, bad: float) -> Tensor:
        """Return the number of a good step or of a bad one, 0-dim float32."""
        if (good, bad) not in self._chosen:
            # `torch.where` would copy its numbers to the device, for which the host waits.
            number = torch.full((), bad, device=self._is_good.device)
            self._chosen[good, bad] = number.masked_fill_(self._is_good, good)
        return self._chosen[good, bad]

    def clear(self, tensors: Sequence[Tensor]) -> None:
        """Set float32 tensors to zero if the step is bad, whatever is in them."""
        if tensors:
            torch._foreach_mul_(_bits(tensors), self._keeps)

    def restore(self, tensors: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        """Set float32 tensors to copies of what they were if the step is bad; the copies are used up."""
        torch._foreach_mul_(_bits(tensors), self._keeps)
        torch._foreach_mul_(_bits(before), self._drops)
        torch._foreach_add_(_bits(tensors), _bits(before))


def uncount(rule: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Take back that a bad step has counted as an update of parameters of a rule, as far as it counts any."""
    for p in parameters:
        if "step" in rule.state[p]:
            rule.state[p]["step"] -= 1


def _bits(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().view(torch.int32) for tensor in tensors]
