"""AdamW: torch's, with its state from the start, and a step that a gate can hold back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
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
    def step_through(self, gate: StepGate | None) -> None:
        """Take the step that `step` takes, to the bit; through a gate it changes no tensor on the device if it is bad.

        Gradients are used up: roots are computed in their place, so that there is no copy of anything, and all
        parameters are updated at once. In a bad step gradients are finite, as zeros are. Updates are counted in any
        case: the host calls `uncount`.
        """
        together: dict[tuple, list[Mapping[str, Any]]] = defaultdict(list)
        for group in self.param_groups:
            members = [p for p in group["params"] if p.grad is not None]
            if members:
                together[tuple(group["betas"]), group["eps"]].append({**group, "params": members})
        for groups in together.values():
            self._step_through(gate, groups)

    def _step_through(self, gate: StepGate | None, groups: Sequence[Mapping[str, Any]]) -> None:
        """Update groups with the same `betas` and `eps`."""

        def choose(good: float, bad: float) -> Tensor | float:
            return good if gate is None else gate.choose(good, bad)

        (beta1, beta2), eps = groups[0]["betas"], groups[0]["eps"]
        members = [p for group in groups for p in group["params"]]
        rates = [group["lr"] for group in groups for _ in group["params"]]
        states, gradients = [self.state[p] for p in members], [p.grad for p in members]
        averages, squares = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        torch._foreach_add_([state["step"] for state in states], 1.0)
        counts = [state["step"].item() for state in states]
        for group in groups:
            if group["weight_decay"]:
                torch._foreach_mul_(group["params"], choose(1 - group["lr"] * group["weight_decay"], 1.0))
        weight = choose(1 - beta1, 0.0)
        torch._foreach_lerp_(averages, gradients, weight if gate is None else [weight] * len(members))
        torch._foreach_mul_(squares, choose(beta2, 1.0))
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        roots = gradients
        torch._foreach_copy_(roots, squares)
        torch._foreach_sqrt_(roots)
        torch._foreach_div_(roots, [(1 - beta2**count) ** 0.5 for count in counts])
        # What is divided by infinity moves nothing. Without `alpha` the host would read a tensor's number.
        torch._foreach_add_(roots, choose(eps, torch.inf), **({} if gate is None else {"alpha": 1}))
        steps = [-(rate / (1 - beta1**count)) for rate, count in zip(rates, counts, strict=True)]
        torch._foreach_addcdiv_(members, averages, roots, steps)


def adamw_state(p: Tensor) -> dict[str, Tensor]:
    """Return the state of a parameter before its first update."""
    return {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
