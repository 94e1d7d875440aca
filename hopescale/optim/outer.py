"""The outer optimizer: float32 masters, groups, cadences and one clip norm around an update rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hopescale.config.schema import OptimConfig
from hopescale.optim.cadence import Accumulator, Cadence
from hopescale.optim.groups import assign_groups
from hopescale.optim.schedule import learning_rate


class OuterOptimizer:
    """AdamW (torch's, decoupled weight decay, arXiv 1711.05101) over named parameters.

    A step is: `take()` after every backward pass, `grad_norm(due(step))`, `step(step, norm)`. A parameter that is not
    due keeps gathering. Low-precision parameters have a float32 master that alone is updated.

    Args:
        parameters: Parameters by name.
        config: Rule, rates and groups.
        total_steps: Horizon of the schedule.
        cadences: Cadence of every parameter that is not updated at each step, by name.

    Raises:
        ConfigError: If a parameter is in no group or in two, or a group takes none.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: OptimConfig,
        total_steps: int,
        cadences: Mapping[str, Cadence],
    ):
        self.config, self.total_steps = config, total_steps
        self.parameters = dict(parameters)
        self.groups = assign_groups(self.parameters, config.groups)
        self.masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }
        self.accumulators = {name: Accumulator(p, cadences.get(name, Cadence())) for name, p in self.parameters.items()}
        self.rule = torch.optim.AdamW(self._torch_groups(), lr=config.lr, eps=config.eps, foreach=True)
        for master in self.masters.values():
            # What torch would make at the first step; made now so that a checkpoint always has the same tensors.
            self.rule.state[master] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def _torch_groups(self) -> list[dict]:
        config, result = self.config, []
        for name, group in config.groups.items():
            members = [self.masters[p] for p, owner in self.groups.items() if owner == name]
            decay = config.weight_decay if group.weight_decay is None else group.weight_decay
            betas = group.betas or config.betas
            if members:
                result.append({"params": members, "weight_decay": decay, "betas": betas, "name": name})
        return result

    def rates(self, step: int) -> dict[str, float]:
        """Return the learning rate of each group at a step."""
        rate = learning_rate(step, self.config.lr, self.total_steps, self.config.schedule)
        return {group["name"]: rate * self.config.groups[group["name"]].lr_scale for group in self.rule.param_groups}

    def take(self) -> None:
        """Move the gradients of a backward pass into the accumulators."""
        for accumulator in self.accumulators.values():
            accumulator.take()

    def due(self, step: int) -> list[str]:
        """Return the names of the parameters that step `step` updates."""
        return [name for name, accumulator in self.accumulators.items() if accumulator.cadence.is_due(step)]

    def grad_norm(self, names: Iterable[str]) -> Tensor:
        """Return the global norm of the gathered gradients of `names`, of each the mean per step of its period."""
        chosen = [self.accumulators[name] for name in names]
        if not chosen:
            return torch.zeros(())
        norms = torch.stack(torch._foreach_norm([accumulator.gathered() for accumulator in chosen]))
        return torch.linalg.vector_norm(norms / norms.new_tensor([a.cadence.period for a in chosen]))

    @torch.no_grad()
    def step(self, step: int, grad_norm: Tensor) -> None:
        """Update what is due at step `step`, with the sum of its gradients scaled to the clip norm.

        Args:
            step: Counted from 1.
            grad_norm: Of all due parameters, `grad_norm(due(step))`.
        """
        clip, names = self.config.grad_clip, self.due(step)
        scale = 1.0 if clip is None else (clip / (grad_norm + 1e-6)).clamp_max(1.0)
        for name in names:
            self.masters[name].grad = self.accumulators[name].gathered() * scale
        rates = self.rates(step)
        for group in self.rule.param_groups:
            group["lr"] = rates[group["name"]]
        self.rule.step()
        for name in names:
            master, parameter = self.masters[name], self.parameters[name]
            master.grad = None
            self.accumulators[name].clear()
            if master is not parameter:
                parameter.copy_(master)

    def state_dict(self) -> dict[str, Tensor]:
        """Return every tensor a resume needs, by name; load by copying into them."""
        result = {}
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                result[f"{name}.master"] = master.detach()
            result |= {f"{name}.{key}": value for key, value in self.rule.state[master].items()}
            if self.accumulators[name].kept:
                result[f"{name}.accumulator"] = self.accumulators[name].total
        return result
