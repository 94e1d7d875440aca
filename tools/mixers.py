"""Mixers by name, as settings of the model's config, in stacks of blocks without embedding and head."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import get_args

import torch

from hopescale.common.errors import ConfigError
from hopescale.config.check import require_valid
from hopescale.config.load import load_recipe
from hopescale.config.schema import ModelConfig, TrainConfig
from hopescale.models import Model
from hopescale.ops.backends import Backend, Recompute

BASELINE = "transformer"
"""What every ratio is taken to."""

_STATIC = {"adaptive": "[]", "targets": "value"}
_MATRIX = _STATIC | {"memory": "linear", "momentum": "false"}
_PLAIN = _MATRIX | {"inner_rule": "gd", "objective": "dot", "read": "inclusive"}

MIXERS: dict[str, dict[str, str]] = {
    BASELINE: {},
    "hope-mlp": {},
    "hope-linear": {"memory": "linear"},
    "titans": _STATIC | {"inner_rule": "gd"},
    "ttt-mlp": _STATIC | {"inner_rule": "gd", "momentum": "false", "retention": "false"},
    "ttt-linear": _MATRIX | {"inner_rule": "gd", "retention": "false"},
    "deltanet": _MATRIX | {"objective": "dot", "read": "inclusive", "retention": "false"},
    "gated-deltanet": _MATRIX | {"objective": "dot", "read": "inclusive", "gate": "true"},
    "retnet": _PLAIN | {"conv_width": "null", "gate": "true"},
    "mamba2": _PLAIN | {"gate": "true"},
    "linear-attention": _PLAIN | {"conv_width": "null", "retention": "false"},
}
"""Settings of the self-modifying mixer by the name of what they come nearest to; the baseline is softmax attention."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a stack and of its input, what it computes again in the backward pass, and what with."""

    d_model: int
    heads: int
    layers: int
    batch: int
    recompute: str
    compile: bool = False
    backend: str = "auto"


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Add the options that `shape_of` reads."""
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--recompute", default=TrainConfig().recompute, choices=get_args(Recompute))
    parser.add_argument("--compile", action="store_true", help="compile chunk loops: minutes before the first pass")
    parser.add_argument("--backend", default=TrainConfig().backend, choices=get_args(Backend), help="of memories")


def shape_of(arguments: argparse.Namespace) -> Shape:
    """Read a shape from a command line."""
    return Shape(**{field.name: getattr(arguments, field.name) for field in fields(Shape)})


def configure(mixer: str, shape: Shape) -> ModelConfig:
    """Return the config of a stack: the mixer, then one gated MLP as wide as a Transformer's.

    Args:
        mixer: A name of `MIXERS`, with changes to its settings after colons: `hope-mlp:chunk_size=128:memory_dim=32`.
        shape: Sizes of the model. It gets two blocks more, so that those between need no embedding and no head.

    Raises:
        ConfigError: If there is no such name, or the settings do not go together.
    """
    name, *changes = mixer.split(":")
    if name not in MIXERS:
        raise ConfigError(f"there is no mixer {name!r}", f"the names are {', '.join(MIXERS)}")
    kind = "attention" if name == BASELINE else "self_modifying"
    settings = [f"{key}={value}" for key, value in MIXERS[name].items()] + changes
    sizes = {"d_model": shape.d_model, "num_heads": shape.heads, "num_layers": shape.layers + 2}
    sizes["mixers.attention.kind"] = kind
    sizes["cms.levels.mlp.d_ff"] = round(8 * shape.d_model / 3 / 16) * 16
    overrides = [f"model.{key}={value}" for key, value in sizes.items()]
    overrides += [f"model.mixers.attention.{setting}" for setting in settings]
    return require_valid(load_recipe("transformer_tiny", overrides)).config.model


def make_pass(mixer: str, shape: Shape, seq_len: int, device: torch.device) -> Callable[[], None]:
    """Build a stack and its input; return its forward and backward, which adds to gradients that exist.

    On a CUDA device weights and activations are bfloat16, except where the model keeps float32.
    """
    blocks = range(1, shape.layers + 1)
    computed = {"recompute": shape.recompute, "compiled": shape.compile, "backend": shape.backend}
    stack = Model(configure(mixer, shape), blocks=blocks, **computed).to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    stack.to_precision(dtype)
    x = torch.randn(seq_len, shape.batch, shape.d_model, device=device, dtype=dtype, requires_grad=True)
    weights = torch.randn_like(x)
    for leaf in (x, *stack.parameters()):
        leaf.grad = torch.zeros_like(leaf)

    def forward_and_backward() -> None:
        y, _ = stack(None, hidden=x)
        y.backward(weights)

    return forward_and_backward
