"""Initial weights: each a function of the seed and the parameter's name, so that no layout changes the model."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from hopescale.parallel.deferred import is_deferred
from hopescale.parallel.layers import ParameterSpec
from hopescale.parallel.mesh import Mesh


def initialize(model: nn.Module, seed: int, mesh: Mesh) -> None:
    """Fill every parameter as its `ParameterSpec` says; a rank takes its slice of the whole tensor.

    Parameters on the device `meta` have shapes and no values, and stay so, as do those without memory.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not (parameter.is_meta or is_deferred(parameter)):
                parameter.copy_(initial_values(name, parameter, seed, mesh))


def initial_values(name: str, parameter: nn.Parameter, seed: int, mesh: Mesh) -> Tensor:
    """Return the initial values of a parameter, or of this rank's slice of it, float32 on the CPU."""
    spec: ParameterSpec = parameter.spec
    shape = spec.whole_shape(parameter.shape, mesh.tp_group.size())
    values = torch.full(shape, spec.mean)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    if spec.std:
        values += spec.std * torch.randn(shape, generator=generator)
    if spec.of_uniform is not None:
        values = spec.of_uniform(torch.rand(shape, generator=generator))
    if spec.identity:
        values += torch.eye(shape[-1])
    if spec.partition_dim is None:
        return values
    return values.chunk(mesh.tp_group.size(), dim=spec.partition_dim)[mesh.tp_group.rank()]
