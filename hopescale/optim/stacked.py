"""What all rules for matrices share: many are updated together, in as few operations as their shapes allow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from hopescale.cost.updates import MATRIX_ELEMENTS
from hopescale.optim.gate import StepGate

STACK_ELEMENTS = {"cpu": 1 << 16, "cuda": MATRIX_ELEMENTS}
"""Matrices are updated together up to this many entries, so that they stay in a CPU's cache (256 KiB in float32), or
that a GPU gets few operations which need little memory beside. One that is larger is updated alone."""

NO_SETTINGS = ("params", "name", "initial_lr", "blocks")
"""Entries of a parameter group that its rule is not told."""


Rule = Callable[..., None]
"""Update of matrices in place: `rule(weight, grad, **state, **inputs, **settings)`, each but the settings a list of
stacks `[..., R, C]` of several shapes. It is told the `step` of each, counted from 1, if the state has one. Settings
are keyword-only."""


def one_by_one(rule: Callable[..., None]) -> Rule:
    """Return the rule of lists that updates each stack by a rule of one."""

    @wraps(rule)
    def update(**given: Any) -> None:
        lists = {name: value for name, value in given.items() if isinstance(value, list)}
        settings = {name: value for name, value in given.items() if name not in lists}
        for tensors in zip(*lists.values(), strict=True):
            rule(**dict(zip(lists, tensors, strict=True)), **settings)

    return update


class StackedOptimizer(torch.optim.Optimizer):
    """Update matrices together.

    The last two dimensions of a parameter are a matrix `[R, C]`; those in front, such as heads, count matrices. A
    parameter with such dimensions is a stack and updated in place. Matrices that share shape, dtype, device and number
    of updates are copied into stacks `[K, R, C]`, updated, and copied back. Stacks of all shapes are updated at once,
    up to `STACK_ELEMENTS` entries, for which a parameter is cut along the dimensions in front.

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

    rule: Rule

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
            members = [p for p in group["params"] if p.grad is not None]
            if counts := [self.state[p]["step"] for p in members if "step" in self.state[p]]:
                torch._foreach_add_(counts, 1.0)
            for batch in _batches(self._stacks(members)):
                self._update_together(group, batch, gate)
        return loss

    def _stacks(self, parameters: Iterable[Tensor]) -> Iterator[_Stack]:
        alike = defaultdict(list)
        for p in parameters:
            if p.ndim > 2:
                tensors = (p, p.grad, *(tensor for name, tensor in self.state[p].items() if name != "step"))
                yield from _cut(p, can_be_cut=all(tensor.is_contiguous() for tensor in tensors))
            else:
                alike[p.shape, p.dtype, p.device, getattr(p, "parts", ()), self._count(p)].append(p)
        for members in alike.values():
            size = max(1, _room(members[0]) // max(1, members[0].numel()))
            for first in range(0, len(members), size):
                yield _Stack(members[first : first + size])

    def _count(self, p: Tensor) -> int | None:
        """Return the number of a parameter's updates, if its rule counts them."""
        count = self.state[p].get("step")
        return None if count is None else int(count.item())

    def _update_together(self, group: Mapping[str, Any], batch: Sequence[_Stack], gate: StepGate | None) -> None:
        settings = {name: value for name, value in group.items() if name not in NO_SETTINGS}
        names = ["weight", *(name for name in self.state[batch[0].members[0]] if name != "step")]
        given: dict[str, list[Any]] = defaultdict(list)
        copied: list[tuple[Tensor, Tensor]] = []
        copied_blocks: list[tuple[Tensor, Tensor]] = []
        for stack in batch:
            of_members = [self._tensors(p) for p in stack.members]
            tensors = {name: stack.take([each[name] for each in of_members]) for name in of_members[0]}
            if len(stack.members) > 1:
                copied += [
                    (each[name], part)
                    for name in names
                    for each, part in zip(of_members, tensors[name].unbind(), strict=True)
                ]
            count = self._count(stack.members[0])
            for block, places in _blocks(tensors, getattr(stack.members[0], "parts", ()), group["blocks"]):
                for name, tensor in block.items():
                    given[name].append(tensor)
                if count is not None:
                    given["step"].append(count)
                copied_blocks += [(p, block[name].view(p.shape)) for name, p in places.items() if name in names]
        changing = [tensor for name in names for tensor in given[name]]
        before = [] if gate is None else torch._foreach_clone(changing)
        self.rule(**given, **settings)
        if gate is not None:
            gate.restore(changing, before)
        # Blocks may be parts of stacks.
        for copies in (copied_blocks, copied):
            if copies:
                torch._foreach_copy_([place for place, _ in copies], [tensor for _, tensor in copies])

    def _tensors(self, p: Tensor) -> dict[str, Tensor]:
        """Return what the rule changes and reads of a parameter."""
        state = {name: tensor for name, tensor in self.state[p].items() if name != "step"}
        return {"weight": p, "grad": p.grad} | state | self.inputs(p)


@dataclass(frozen=True)
class _Stack:
    """Parameters of one shape, or of a single one some of its matrices: a slice along the dimensions in front."""

    members: Sequence[Tensor]
    matrices: slice | None = None

    @property
    def entries(self) -> int:
        """Return the entries of the weights."""
        p = self.members[0]
        if self.matrices is None:
            return len(self.members) * p.numel()
        return (self.matrices.stop - self.matrices.start) * p.shape[-2:].numel()

    def take(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return what of tensors of the members belongs to it: of several a copy, of a single one a view."""
        if len(tensors) > 1:
            return torch.stack(tuple(tensors))
        return tensors[0] if self.matrices is None else tensors[0].flatten(0, -3)[self.matrices]


def _room(p: Tensor) -> int:
    return STACK_ELEMENTS.get(p.device.type, STACK_ELEMENTS["cuda"])


def _cut(p: Tensor, *, can_be_cut: bool) -> Iterator[_Stack]:
    """Cut a parameter along what is in front of its matrices, so that there is room for each part."""
    count, size = p.shape[:-2].numel(), max(1, _room(p) // max(1, p.shape[-2:].numel()))
    if not can_be_cut or count <= size:
        yield _Stack([p])
        return
    for first in range(0, count, size):
        yield _Stack([p], slice(first, min(first + size, count)))


def _batches(stacks: Iterable[_Stack]) -> Iterator[list[_Stack]]:
    """Put together what is of one type, on one device, and what there is room to update at once."""
    alike = defaultdict(list)
    for stack in stacks:
        alike[stack.members[0].dtype, stack.members[0].device].append(stack)
    for same in alike.values():
        batch, entries = [], 0
        for stack in same:
            if batch and entries + stack.entries > _room(stack.members[0]):
                yield batch
                batch, entries = [], 0
            batch.append(stack)
            entries += stack.entries
        yield batch


def _blocks(
    tensors: Mapping[str, Tensor], parts: Sequence[tuple[int, int]], blocks: str
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Yield what of tensors `[..., R, C]` is matrices to a rule, and the places of what has been copied for it."""
    if blocks == "matrix" or not parts:
        yield dict(tensors), {}
        return
    widths = [count * width for count, width in parts]
    split = {
        name: tensor.unflatten(-2, (-1, sum(widths))).split(widths, dim=-2) for name, tensor in tensors.items()
    }  # [..., G, r, C]
    for number, part in enumerate(parts):
        places = {name: of_parts[number] for name, of_parts in split.items()}
        if blocks == "heads":
            yield {name: place.unflatten(-2, part) for name, place in places.items()}, {}
        else:
            # A view if there is one group of rows, or one part in it.
            is_view = len(parts) == 1 or places["weight"].shape[-3] == 1
            yield {name: place.flatten(-3, -2) for name, place in places.items()}, {} if is_view else places
