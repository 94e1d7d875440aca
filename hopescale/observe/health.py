"""Whether a step's loss may still be trusted. Looks at numbers only; stops the run by raising."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

from hopescale.common.errors import DivergedError

_HINT = (
    "this step has changed no weight, and checkpoints are untouched; continue from an earlier one "
    "(--resume CHECKPOINT), or begin anew, with a lower optim.lr or optim.grad_clip"
)


class LossWatch:
    """Stops a run whose loss or gradient is not finite, or whose loss jumps above the mean of the last ones.

    To be asked after the backward pass and before the optimizer, so that a bad step never reaches the weights.

    Args:
        spike: Nats above the mean of the window that count as divergence; None looks only for what is not finite.
        window: Losses in the mean. No spike is seen before the window is full.
    """

    def __init__(self, spike: float | None, *, window: int = 32):
        self.spike = spike
        self._losses: deque[float] = deque(maxlen=window)

    def check(self, step: int, loss: float, grad_norm: float | None, where: Callable[[], str]) -> None:
        """Judge a step, then take its loss into the window; `where` tells what its batch was, if the run stops.

        Raises:
            DivergedError: If the step must not reach the weights; its loss is not taken into the window.
        """
        problem = self._problem(loss, grad_norm)
        if problem:
            raise DivergedError(f"step {step}: {problem}; batch: {where()}", _HINT)
        self._losses.append(loss)

    def _problem(self, loss: float, grad_norm: float | None) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if grad_norm is not None and not math.isfinite(grad_norm):
            return f"the gradient norm is {grad_norm} (loss {loss:.4f})"
        if self.spike is None or len(self._losses) < self._losses.maxlen:
            return None
        mean = math.fsum(self._losses) / len(self._losses)
        if loss - mean <= self.spike:
            return None
        return (
            f"the loss {loss:.4f} is {loss - mean:.2f} nats above the mean {mean:.4f} of the last {len(self._losses)} "
            f"(train.loss_spike={self.spike:g})"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the window, fit for JSON."""
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the window of `state_dict`."""
        self._losses = deque(state["losses"], maxlen=self._losses.maxlen)
