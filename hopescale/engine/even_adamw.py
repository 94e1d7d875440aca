"""AdamW on the parts that a replica has of many flat tensors, all at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hopescale.engine.zero_even import EvenShards
from hopescale.optim import RuleGroup
from hopescale.optim.adamw import AdamW
from hopescale.optim.gate import StepGate
from hopescale.optim.updater import Rates, Scales, scale_together


class EvenAdamW:
    """One rule for all sets: the number of its operations depends on groups and entries, not on sets or parameters.

    Args:
        sets: Sets of shards.
        groups: Groups that share settings.
        eps: Term of AdamW.
    """

    def __init__(self, sets: Sequence[EvenShards], groups: Sequence[RuleGroup], eps: float):
        settings = []
        for group in groups:
            parts = [part.master for shards in sets for part in shards.parts if part.group == group.name]
            if parts:
                settings.append(group.of({}) | {"params": parts})
        # A replica may have nothing but what fills up its shards.
        self._rule = AdamW(settings, eps=eps, foreach=True) if settings else None
        for part in (part for shards in sets for part in shards.parts):
            self._rule.state[part.master] |= part.moments

    def step(self, due: Sequence[EvenShards], scales: Scales, rates: Rates, gate: StepGate | None = None) -> None:
        """Update sets with their gradients, multiplied by the scale of their parameters, and hand out the weights.

        Through a gate the update is one of a good step alone; it counts in any case.
        """
        if self._rule is not None:
            for group in self._rule.param_groups:
                group["lr"] = rates[group["name"]]
        gradients = [shards.take_gradient() for shards in due]
        # All of a set have one cadence, and so one factor.
        scale_together(gradients, [scales[next(iter(shards.parameters))] for shards in due])
        if gate is not None:
            gate.clear(gradients)
        self._update(due, gradients, gate)
        del gradients
        low = [shards for shards in due if shards.is_low_precision]
        if low:
            torch._foreach_copy_([shards.own for shards in low], [shards.master for shards in low])
        for shards in due:
            shards.end_update()

    def _update(self, sets: Sequence[EvenShards], gradients: Sequence[Tensor], gate: StepGate | None) -> None:
        parts = [part for shards in sets for part in shards.parts]
        for shards, gradient in zip(sets, gradients, strict=True):
            for part in shards.parts:
                part.master.grad = gradient[part.start : part.stop]
                self._rule.state[part.master]["step"].copy_(shards.updates)
        if parts:
            self._rule.step_through(gate)
        for part in parts:
            part.master.grad = None
