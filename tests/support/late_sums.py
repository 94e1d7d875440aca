"""Late and rounded sums of levels as a loop on one process, whatever the replicas are on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hopescale.config.schema import GroupConfig, OptimConfig, ScheduleConfig
from hopescale.optim import Cadence, OuterOptimizer
from hopescale.optim.muon import Muon
from hopescale.parallel.layers import ParameterSpec, attach

STEPS = 9
CADENCES = {
    "a": Cadence(4, phase=1, lag=2),
    "b": Cadence(3, wire="int8"),
    "c": Cadence(3, lag=1, wire="int4"),
    "e": Cadence(2, wire="bf16"),
    "d": Cadence(),
}
MOST = {"int8": 127, "int4": 7}


def rounded(sums: Tensor, wire: str) -> Tensor:
    """Round each block of 64 entries by itself, entry by entry; bfloat16 without blocks."""
    if wire == "bf16":
        return sums.bfloat16().float()
    result = []
    for block in sums.flatten().split(64):
        scale = block.abs().max() / MOST[wire]
        result += [(value / scale).round() * scale for value in block]
    return torch.stack(result).view_as(sums)


def draw(name: str, step: int, replica: int = 0) -> Tensor:
    """Return a gradient of 256 entries: four blocks of the wire, or two in the part of each of two replicas."""
    return torch.randn(16, 16, generator=torch.Generator().manual_seed(1000 * replica + 10 * step + ord(name)))


def make(rule: str, **settings: Any) -> OuterOptimizer:
    """Return an optimizer of a parameter for each cadence."""
    group = GroupConfig(rule=rule)
    config = OptimConfig(
        lr=0.05, eps=0.1, grad_clip=0.5, groups={"all": group}, schedule=ScheduleConfig(min_lr_ratio=1.0)
    )
    parameters = {name: attach(nn.Parameter(draw(name, 0)), ParameterSpec()) for name in CADENCES}
    return OuterOptimizer(parameters, config, STEPS, CADENCES, levels=[[name] for name in CADENCES], **settings)


def take(optimizer: OuterOptimizer, step: int) -> Tensor:
    """Take a step of this replica; return the norm of what was due."""
    replica = optimizer.mesh.dp_group.rank()
    for name, parameter in optimizer.parameters.items():
        parameter.backward(draw(name, step, replica))
    due = optimizer.due(step)
    for name in due:
        optimizer.reduce([name])
    norm = optimizer.grad_norms({"due": due})["due"]
    optimizer.step(step, norm)
    return norm


class Twin:
    """The rule as a loop: a period's sum is rounded, what is lost stays for the next, and the update comes later."""

    def __init__(self, rule: str, replicas: int = 1):
        self.weights = {name: nn.Parameter(draw(name, 0)) for name in CADENCES}
        settings = {"lr": 0.05, "weight_decay": 0.1}
        self.rules = {
            name: torch.optim.AdamW([weight], betas=(0.9, 0.95), eps=0.1, **settings)
            if rule == "adamw"
            else Muon([{"params": [weight], **settings}])
            for name, weight in self.weights.items()
        }
        self.gathered = {name: [torch.zeros(16, 16) for _ in range(replicas)] for name in CADENCES}
        self.waiting: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in CADENCES}

    def step(self, step: int) -> Tensor:
        """Take a step of all replicas; return the norm of what was due."""
        for name, cadence in CADENCES.items():
            gathered = self.gathered[name]
            for replica in range(len(gathered)):
                gathered[replica] = gathered[replica] + draw(name, step, replica)
            if (step + cadence.phase) % cadence.period == 0:
                sent = [total if cadence.wire == "fp32" else rounded(total, cadence.wire) for total in gathered]
                self.gathered[name] = [total - part for total, part in zip(gathered, sent, strict=True)]
                self.waiting[name].append((step + cadence.lag, sum(sent)))
        due = {name: sums.pop(0)[1] for name, sums in self.waiting.items() if sums and sums[0][0] == step}
        norm = torch.cat([(sent / CADENCES[name].period).flatten() for name, sent in due.items()]).norm()
        for name, sent in due.items():
            self.weights[name].grad = sent * (0.5 / (norm + 1e-6)).clamp_max(1.0)
            self.rules[name].step()
        return norm
