"""What all rules for matrices share: equal shapes are updated together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from hopescale.optim.gate import StepGate

STACK_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Matrices are stacked up to this many entries, so that a stack stays in a CPU's cache (256 KiB in float32) or keeps a
GPU busy (16 MiB). One that is larger is updated alone, in place."""


NO_SETTINGS = ("params", "name", "initial_lr", "blocks")
"""Entries of a parameter group that its rule is not told."""


class StackedOptimizer(torch.optim.Optimizer):
    """Update matrices of equal shape together.

    The last two dimensions of a parameter are a matrix `[R, C]`; those in front, such as heads, count matrices. What
    shares shape, dtype, device and number of updates is copied into stacks `[K, ..., R, C]`, updated, and copied back.
    A parameter that is a stack already, by its dimensions in front, is updated in place, part by part.

    State is made when a parameter is added, so that every checkpoint has the same tensors. It holds nothing but
    tensors; `step`, where a rule needs it, is a 0-dim float32 tensor on the CPU that counts the parameter's own
    updates. A parameter whose gradient is None is left alone, with its state; a gradient of zeros is an update like any
    other: weights decay, and what a momentum holds moves them on.

    A parameter may fuse projections, which its attribute `parts` names as `ParameterSpec` does; to the rule, `blocks`
    of its rows are then matrices of their own.

    Subclasses name their `rule`, provide `init_state`, and `check` and `inputs` where they need them.

    Args:
        params: Parameters `[..., R, C]`, or torch's parameter groups.
        lr: Learning rate.
        blocks: Matrices of a parameter with `parts`: the whole `matrix`, `projections` or `heads`. Only with
            rules whose state has the shape of the parameter.
        settings: Other keyword-only arguments of `rule`, whose defaults hold here too.

    Raises:
        ValueError: If a parameter is no matrix, or settings mean nothing together.
    """

    rule: Callable[..., None]
    """Update of matrices in place: `rule(weight, grad, **state, **inputs, **settings)`. It is told its `step`, counted
    from 1, if the state has one."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, *, blocks: str = "matrix", **settings: Any):
        arguments = signature(self.rule).parameters.values()
        defaults = {each.name: each.default for each in arguments if each.kind is each.KEYWORD_ONLY}
        if unknown := sorted(settings.keys() - defaults):
            raise TypeError(f"{type(self).__name__} has no setting {', '.join(unknown)}")
        settings = defaults | {"lr": lr} | settings
        self.check(settings)
        super().__init__(params, settings | {"blocks": blocks})

    def check(self, settings: dict[str, Any]) -> None:
        """Refuse settings that mean nothing together, and fill in those that follow from others."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters and make their state."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            if p.ndim < 2:
                raise ValueError(f"{type(self).__name__} updates matrices, but a parameter has shape {tuple(p.shape)}")
            self.state[p] = self.init_state(p, group)

    def init_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter before its first update."""
        raise NotImplementedError

    def inputs(self, p: Tensor) -> dict[str, Tensor]:
        """Return what else the rule reads to update a parameter."""
        return {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, gate: StepGate | None = None) -> Any:
        """Update every parameter that has a gradient, once; through a gate if it is of a good step.

        Updates are counted in any case: the host calls `uncount` after a bad step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for members in self._stacks(group["params"]):
                self._update_together(group, members, gate)
        return loss

    def uncount(self, parameters: Iterable[Tensor]) -> None:
        """Take back that a bad step has counted as an update of parameters."""
        for p in parameters:
            if "step" in self.state[p]:
                self.state[p]["step"] -= 1

    def _stacks(self, parameters: Iterable[Tensor]) -> list[list[Tensor]]:
        alike = defaultdict(list)
        for p in parameters:
            if p.grad is not None:
                step = self.state[p].get("step")
                count = None if step is None else step.item()
                alike[p.shape, p.dtype, p.device, getattr(p, "parts", ()), count].append(p)
        stacks = []
        for (shape, _, device, *_), members in alike.items():
            size = _matrices_at_once(device, shape.numel())
            stacks += [members[i : i + size] for i in range(0, len(members), size)]
        return stacks

    def _update_together(self, group: dict[str, Any], members: Sequence[Tensor], gate: StepGate | None) -> None:
        states = [self.state[p] for p in members]
        settings = {name: value for name, value in group.items() if name not in NO_SETTINGS}
        if "step" in states[0]:
            torch._foreach_add_([state["step"] for state in states], 1.0)
            settings["step"] = int(states[0]["step"].item())
        names = [name for name in states[0] if name != "step"]
        changed = [members, *([state[name] for state in states] for name in names)]
        weight, *stacked = (_stack(tensors) for tensors in changed)
        inputs = [self.inputs(p) for p in members]
        read = {name: _stack([each[name] for each in inputs]) for name in inputs[0]}
        grad = _stack([p.grad for p in members])
        parts = getattr(members[0], "parts", ())
        for tensors in _parts([weight, grad, *stacked, *read.values()]):
            for w, g, *rest in _blocks(tensors, parts, group["blocks"]):
                changing = [w, *rest[: len(names)]]
                before = [] if gate is None else torch._foreach_clone(changing)
                self.rule(w, g, **dict(zip([*names, *read], rest, strict=True)), **settings)
                if gate is not None:
                    gate.restore(changing, before)
        if len(members) > 1:
            for tensors, stack in zip(changed, (weight, *stacked), strict=True):
                torch._foreach_copy_(tensors, stack.unbind())


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(tuple(tensors)) if len(tensors) > 1 else tensors[0]


def _blocks(tensors: Sequence[Tensor], parts: Sequence[tuple[int, int]], blocks: str) -> Iterator[Sequence[Tensor]]:
    """Yield what of tensors `[..., R, C]` is matrices to a rule, to be changed in place until the next is asked for."""
    if blocks == "matrix" or not parts:
        yield tensors
        return
    widths = [count * width for count, width in parts]
    split = [tensor.unflatten(-2, (-1, sum(widths))).split(widths, dim=-2) for tensor in tensors]  # [..., G, r, C]
    for part, places in zip(parts, zip(*split, strict=True), strict=True):
        if blocks == "heads":
            yield [place.unflatten(-2, part) for place in places]
            continue
        joined = [place.flatten(-3, -2) for place in places]
        yield joined
        for place, whole in zip(places, joined, strict=True):
            place.copy_(whole.view(place.shape))


def _matrices_at_once(device: torch.device, elements: int) -> int:
    return max(1, STACK_ELEMENTS.get(device.type, STACK_ELEMENTS["cuda"]) // max(1, elements))


def _parts(tensors: Sequence[Tensor]) -> Iterable[Sequence[Tensor]]:
    """Cut tensors `[..., R, C]` along what is in front of the matrices, into views that are small enough."""
    weight = tensors[0]
    size = _matrices_at_once(weight.device, weight.shape[-2] * weight.shape[-1])
    if weight.ndim == 2 or size >= weight.shape[:-2].numel() or not all(t.is_contiguous() for t in tensors):
        return [tensors]
    return zip(*(t.flatten(0, -3).split(size) for t in tensors), strict=True)
