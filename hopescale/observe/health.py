"""Whether a step's loss and gradient may still be trusted. Looks at numbers only."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limit:
    """What a number may be.

    Attributes:
        base: Number above which it is measured.
        most: Most that it may be above that.
    """

    base: float
    most: float


@dataclass(frozen=True)
class StepLimits:
    """What a step's loss and gradient norm may be, beside finite; None is all that is finite."""

    loss: Limit | None = None
    grad_norm: Limit | None = None


class LossWatch:
    """Refuses steps whose loss or gradient is not finite, or far above the mean of the last ones.

    The optimizer gates updates by the same limits (`optim/gate.py`), so that a bad step never reaches the weights.

    Args:
        loss_spike: Nats above the mean of the window from which on a loss is refused; None refuses none.
        norm_spike: Factor on the mean of the window from which on a gradient norm is refused; None refuses none.
        window: Steps in the means. No spike is seen before the window is full.

    Attributes:
        refused: Steps refused since the start of the run.
        in_a_row: Steps refused since the last good one.
    """

    def __init__(self, loss_spike: float | None, norm_spike: float | None = None, *, window: int = 32):
        self.loss_spike, self.norm_spike, self.window = loss_spike, norm_spike, window
        self.refused = self.in_a_row = 0
        self._losses: deque[float] = deque(maxlen=window)
        self._norms: deque[float] = deque(maxlen=window)

    def judge(self, loss: float, grad_norm: float, waiting_norm: float = 0.0) -> str | None:
        """Take a good step into the window and return None; count a bad one, and say what is wrong with it.

        Args:
            loss: Loss of the step.
            grad_norm: Norm of the gradients that are to be applied.
            waiting_norm: Norm of those that add up to be applied later; only whether it is finite counts.
        """
        problem = self._problem(loss, grad_norm if math.isfinite(waiting_norm) else waiting_norm)
        if problem is not None:
            self.refused, self.in_a_row = self.refused + 1, self.in_a_row + 1
            return problem
        self._losses.append(loss)
        self._norms.append(grad_norm)
        self.in_a_row = 0
        return None

    def limits(self) -> StepLimits:
        """Return the limits beyond which `judge` would refuse the next step."""
        loss, norm = _mean(self._losses), _mean(self._norms)
        return StepLimits(
            None if self.loss_spike is None or loss is None else Limit(loss, self.loss_spike),
            None if self.norm_spike is None or not norm else Limit(0.0, self.norm_spike * norm),
        )

    def _problem(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm} (loss {loss:.4f})"
        mean = _mean(self._losses)
        if self.loss_spike is not None and mean is not None and loss - mean > self.loss_spike:
            return (
                f"the loss {loss:.4f} is {loss - mean:.2f} nats above the mean {mean:.4f} of the last {self.window} "
                f"(train.loss_spike={self.loss_spike:g})"
            )
        mean = _mean(self._norms)
        if self.norm_spike is not None and mean and grad_norm > self.norm_spike * mean:
            return (
                f"the gradient norm {grad_norm:.4g} is {grad_norm / mean:.1f} times the mean {mean:.4g} of the last "
                f"{self.window} (train.norm_spike={self.norm_spike:g})"
            )
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return the window and the counts, fit for JSON."""
        counts = {"refused": self.refused, "in_a_row": self.in_a_row}
        return {"losses": list(self._losses), "norms": list(self._norms), **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the state of `state_dict`; one written before there were norms and counts has none."""
        self._losses = deque(state["losses"], maxlen=self.window)
        self._norms = deque(state.get("norms", []), maxlen=self.window)
        self.refused, self.in_a_row = state.get("refused", 0), state.get("in_a_row", 0)


def _mean(values: deque[float]) -> float | None:
    """Return the mean of a full window."""
    return math.fsum(values) / len(values) if len(values) == values.maxlen else None
