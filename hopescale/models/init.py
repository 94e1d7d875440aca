"""Initial weights: functions of seed, parameter's name and place, so that no layout changes the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor, nn

from hopescale.ops.draws import RandomBits, normal, uniform
from hopescale.parallel.deferred import is_deferred
from hopescale.parallel.layers import ParameterSpec
from hopescale.parallel.mesh import Mesh

DRAWN_AT_A_TIME = 1 << 15
"""Entries that stay in a processor's cache. On so few torch works with one thread: many short operations on several
would wait for one another after each."""


def initialize(model: nn.Module, seed: int, mesh: Mesh) -> None:
    """Fill every parameter, or this rank's slice of it, as its `ParameterSpec` says.

    Parameters on the device `meta` have shapes and no values, and stay so, as do those without memory.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not (parameter.is_meta or is_deferred(parameter)):
                values = initial_values(name, parameter, seed, mesh, range(parameter.numel()))
                parameter.copy_(values.view_as(parameter))


def initial_values(name: str, parameter: nn.Parameter, seed: int, mesh: Mesh, entries: range) -> Tensor:
    """Return initial values of a parameter, or of this rank's slice of it, float32 on the CPU, one-dimensional.

    A value depends on its position in the whole parameter, and no others are drawn. `entries` are those of the
    flattened parameter, as this rank has it, that are returned.
    """
    spec: ParameterSpec = parameter.spec
    values = torch.full((len(entries),), spec.mean)
    bits = RandomBits(f"{seed}:{name}")
    for begin in range(0, len(entries), DRAWN_AT_A_TIME):
        piece = slice(begin, begin + DRAWN_AT_A_TIME)
        runs = _whole_runs(spec.partition_dim, parameter.shape, mesh, entries[piece])
        if spec.of_uniform is not None:
            values[piece] = spec.of_uniform(uniform(bits.at(runs)))
        elif spec.std:
            values[piece] += normal(bits.at(runs)).mul_(spec.std)
    if spec.identity and entries:
        runs = _whole_runs(spec.partition_dim, parameter.shape, mesh, entries)
        place = torch.cat([torch.arange(run.start, run.stop) for run in runs])
        width = spec.whole_shape(parameter.shape, mesh.tp_group.size())[-1]
        values += place // width % width == place % width
    return values


def _whole_runs(dim: int | None, shape: Sequence[int], mesh: Mesh, entries: range) -> Iterator[range]:
    """Yield where entries of a rank's slice along a dimension lie in the whole parameter, both flattened."""
    tp, rank = mesh.tp_group.size(), mesh.tp_group.rank()
    if dim is None or tp == 1:
        yield entries
        return
    size = prod(shape[dim:])  # entries side by side in both
    for row in range(entries.start // size, -(-entries.stop // size)):
        shift = (row * (tp - 1) + rank) * size
        yield range(max(entries.start, row * size) + shift, min(entries.stop, (row + 1) * size) + shift)
