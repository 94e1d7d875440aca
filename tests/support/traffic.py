"""Counts what a process hands to its collectives, to hold the plan to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from hopescale.engine import Engine
from hopescale.optim import OuterOptimizer
from hopescale.parallel.mesh import Mesh

_FIRST = ("allreduce", "allreduce_coalesced", "reduce", "broadcast", "send")
_SECOND = (
    ("allgather", "_allgather_base", "all_gather_single", "allgather_coalesced")
    + ("allgather_into_tensor_coalesced", "all_gather_single_coalesced")
    + ("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single")
    + ("reduce_scatter_tensor_coalesced", "reduce_scatter_single_coalesced")
    + ("alltoall", "alltoall_base", "all_to_all_single")
)
SENT = dict.fromkeys(_FIRST, 0) | dict.fromkeys(_SECOND, 1)
"""Position of the tensors a rank contributes, among the arguments of each method of a process group. Versions of torch
know some of them by different names."""


class Traffic:
    """Counts the bytes of tensors this rank hands to collectives and sends, by axis; a context manager.

    An all-reduce and a broadcast count their tensor, a reduce-scatter its whole input, an all-gather this rank's part,
    a send its tensor; what an algorithm makes of them on the wire is not looked at. Groups of one rank do not count.
    Whoever communicates - Megatron, DeepSpeed, this package - ends in the counted methods of `ProcessGroup`.

    Args:
        mesh: The ranks, whose axes are counted; decisions are not.
    """

    def __init__(self, mesh: Mesh):
        self.bytes: Counter[str] = Counter()
        axes = {"cp back": "cp", "nodes": "dp"}
        self._axes = {group.group_name: axes.get(axis, axis) for axis, group in mesh.axes().items() if group.size() > 1}
        self._originals: dict[str, Any] = {}

    def __enter__(self) -> Traffic:
        for name, position in SENT.items():
            if name in vars(dist.ProcessGroup):
                # The class's own entry: what `getattr` returns would not bind to an instance when it is put back.
                self._originals[name] = vars(dist.ProcessGroup)[name]
                counting = self._counting(name, getattr(dist.ProcessGroup, name), position)
                setattr(dist.ProcessGroup, name, counting)
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(dist.ProcessGroup, name, original)

    def _counting(self, name: str, original: Any, position: int) -> Any:
        def counted(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
            axis = self._axes.get(group.group_name)
            if axis is not None and len(arguments) > position:
                # With two stages Megatron sends one way over the group of all ranks.
                axis = "pp" if name == "send" and axis != "cp" else axis
                self.bytes[axis] += _num_bytes(arguments[position])
            return original(group, *arguments, **options)

        return counted


def _num_bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.nbytes
    return sum(_num_bytes(tensor) for tensor in tensors)


@dataclass
class StepBytes:
    """Bytes that this rank sent in a training step.

    Attributes:
        axes: Bytes by axis, without axes that sent nothing.
        levels: Bytes by which the gradients of each due level were summed over replicas.
    """

    axes: dict[str, int] = field(default_factory=dict)
    levels: dict[str, int] = field(default_factory=dict)


@contextmanager
def counted_steps(mesh: Mesh) -> Iterator[dict[int, StepBytes]]:
    """Count what this rank sends in each training step, by its number; all else, such as validation, is left out."""
    gradients, update, reduce, send = Engine.gradients, Engine.update, OuterOptimizer.reduce, OuterOptimizer.send
    begin = OuterOptimizer.begin
    late: Counter[tuple[str, ...]] = Counter()
    steps: dict[int, StepBytes] = {}

    def counted_gradients(engine: Engine, step: int, *arguments: Any, **options: Any) -> Any:
        early: Counter[str] = Counter()

        def counted_begin(optimizer: OuterOptimizer, names: list[str]) -> None:
            """Count what begins in the backward pass."""
            before = traffic.bytes["dp"]
            begin(optimizer, names)
            for level, members in engine.levels.items():
                if set(names) <= set(members):
                    early[level] += traffic.bytes["dp"] - before

        def counted_reduce(optimizer: OuterOptimizer, names: list[str]) -> None:
            before = traffic.bytes["dp"]
            reduce(optimizer, names)
            for level, members in engine.levels.items():
                if names and set(names) <= set(members):
                    steps[step].levels[level] = early[level] + traffic.bytes["dp"] - before + late[tuple(names)]

        traffic.bytes.clear()
        steps[step] = StepBytes()
        with patch.multiple(OuterOptimizer, reduce=counted_reduce, begin=counted_begin):
            result = gradients(engine, step, *arguments, **options)
        steps[step].axes = dict(traffic.bytes)
        return result

    def counted_send(optimizer: OuterOptimizer, names: list[str]) -> None:
        """Count what is sent in an update for a later one."""
        before = traffic.bytes["dp"]
        send(optimizer, names)
        late[tuple(names)] = traffic.bytes["dp"] - before

    def counted_update(engine: Engine, step: int, *arguments: Any, **options: Any) -> Any:
        traffic.bytes.clear()
        result = update(engine, step, *arguments, **options)
        total = Counter(steps[step].axes) + traffic.bytes
        steps[step].axes = {axis: count for axis, count in total.items() if count}
        return result

    with (
        Traffic(mesh) as traffic,
        patch.object(Engine, "gradients", counted_gradients),
        patch.object(Engine, "update", counted_update),
        patch.object(OuterOptimizer, "send", counted_send),
    ):
        yield steps
