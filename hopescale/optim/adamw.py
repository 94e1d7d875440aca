"""AdamW: torch's, with its state from the start, and a step that a gate can hold back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hopescale.optim.gate import StepGate


class AdamW(torch.optim.AdamW):
    """AdamW (arXiv 1711.05101), `torch.optim.AdamW` with the same arguments.

    torch makes a parameter's state at its first update; here it is made when the parameter is added, so that every
    checkpoint has the same tensors: `step` (0-dim float32 on the CPU), and `exp_avg` and `exp_avg_sq` in the
    parameter's shape.

    Raises:
        ValueError: For a variant whose state differs: `amsgrad`, `fused` or `capturable`.
    """

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        other = [name for name in ("amsgrad", "fused", "capturable") if any(g[name] for g in self.param_groups)]
        if other:
            raise ValueError(f"AdamW keeps the state of torch's plain variant, not of {', '.join(other)}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters and make their state."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            self.state[p] = adamw_state(p)

    @torch.no_grad()
    def step_through(self, gate: StepGate) -> None:
        """Take the step that `step` takes, to the bit, if it is good, and change no tensor on the device if it is bad.

        Gradients are finite, and zeros in a bad step. Updates are counted in both: the host calls `uncount`.
        """
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            if members:
                self._step_through(gate, members, group)

    def _step_through(self, gate: StepGate, members: list[Tensor], group: Mapping[str, Any]) -> None:
        (beta1, beta2), lr, decay = group["betas"], group["lr"], group["weight_decay"]
        states, gradients = [self.state[p] for p in members], [p.grad for p in members]
        averages, squares = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        torch._foreach_add_([state["step"] for state in states], 1.0)
        counts = [state["step"].item() for state in states]
        if decay:
            torch._foreach_mul_(members, gate.choose(1 - lr * decay, 1.0))
        weight = gate.choose(1 - beta1, 0.0)
        torch._foreach_lerp_(averages, gradients, [weight] * len(members))
        torch._foreach_mul_(squares, gate.choose(beta2, 1.0))
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [(1 - beta2**count) ** 0.5 for count in counts])
        # What is divided by infinity moves nothing. Without `alpha` the host would read the number.
        torch._foreach_add_(roots, gate.choose(group["eps"], torch.inf), alpha=1)
        torch._foreach_addcdiv_(members, averages, roots, [-(lr / (1 - beta1**count)) for count in counts])

    def uncount(self, parameters: Iterable[Tensor]) -> None:
        """Take back that a bad step has counted as an update of parameters."""
        for p in parameters:
            self.state[p]["step"] -= 1


def adamw_state(p: Tensor) -> dict[str, Tensor]:
    """Return the state of a parameter before its first update."""
    return {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
