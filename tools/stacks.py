"""Mixers of the recipes, in stacks of blocks without embedding and head."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import get_args

import torch

from hopescale.common.errors import ConfigError
from hopescale.common.paths import shipped_folder
from hopescale.config.check import require_valid
from hopescale.config.load import load_recipe
from hopescale.config.model_shape import head_dim
from hopescale.config.schema import LinearAttentionConfig, ModelConfig, TrainConfig
from hopescale.models import Model
from hopescale.ops.backends import Backend, Recompute

BASELINE = "transformer"
"""What every ratio is taken to."""


@dataclass(frozen=True)
class Shape:
    """Recipes whose mixers are taken, sizes of a stack and of its input, what is computed again, and what with.

    Attributes:
        documents: Mean tokens of the documents that a sequence holds and that are kept apart; None is no documents.
    """

    size: str
    d_model: int | None
    heads: int | None
    layers: int
    batch: int
    recompute: str
    compile: bool = False
    backend: str = "auto"
    documents: int | None = None


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Add the options that `shape_of` reads."""
    parser.add_argument("--size", default="tiny", help="recipes NAME_SIZE whose mixers are taken: tiny or 1.3b")
    parser.add_argument("--d-model", type=int, help="another width than the recipe's; heads become as much narrower")
    parser.add_argument("--heads", type=int, help="another number of heads than the recipe's, at equal width")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--recompute", default=TrainConfig().recompute, choices=get_args(Recompute))
    parser.add_argument("--compile", action="store_true", help="compile chunk loops: minutes before the first pass")
    parser.add_argument("--backend", default=TrainConfig().backend, choices=get_args(Backend), help="of memories")
    parser.add_argument("--documents", type=int, metavar="N", help="pack documents of N tokens on average, kept apart")


def shape_of(arguments: argparse.Namespace) -> Shape:
    """Read a shape from a command line."""
    return Shape(**{field.name: getattr(arguments, field.name) for field in fields(Shape)})


def systems(size: str) -> list[str]:
    """Return the names of the systems that have a recipe of a size, the baseline first.

    Raises:
        ConfigError: If the baseline has none.
    """
    names = [path.stem.removesuffix(f"_{size}") for path in shipped_folder("recipes").glob(f"*_{size}.yaml")]
    if BASELINE not in names:
        raise ConfigError(f"--size: there is no recipe {BASELINE}_{size}", "take tiny or 1.3b")
    return sorted(names, key=lambda name: (name != BASELINE, name))


def configure(mixer: str, shape: Shape) -> ModelConfig:
    """Return the config of a stack: the mixers of a recipe, each with one gated MLP as wide as a Transformer's.

    Args:
        mixer: A name of `systems`, with changes to the settings of its mixer after colons: `hope:chunk_size=128`.
        shape: Sizes of the model. It gets two blocks more, so that those between need no embedding and no head.

    Raises:
        ConfigError: If there is no such name, or the settings do not go together.
    """
    name, *changes = mixer.split(":")
    if name not in systems(shape.size):
        raise ConfigError(f"there is no mixer {name!r}", f"the names are {', '.join(systems(shape.size))}")
    recipe = f"{name}_{shape.size}"
    model = load_recipe(recipe).config.model
    if changes and len(model.mixers) > 1:
        raise ConfigError(f"{mixer}: a change needs one mixer, {recipe} has {', '.join(model.mixers)}", "leave it out")
    d_model = shape.d_model or model.d_model
    overrides = [f"mixers.{own}.{change}" for own in model.mixers for change in changes]
    overrides += [f"cms.levels.{level}=null" for level in model.cms.levels]
    overrides += [f"cms.levels.all.d_ff={round(8 * d_model / 3 / 16) * 16}"]
    overrides += [f"d_model={d_model}", f"num_layers={shape.layers + 2}", *_scaled_heads(model, d_model, shape.heads)]
    return require_valid(load_recipe(recipe, [f"model.{setting}" for setting in overrides])).config.model


def _scaled_heads(model: ModelConfig, d_model: int, heads: int | None) -> Iterator[str]:
    """Yield the heads at another width and number, in the proportions of the recipe."""
    heads = heads or model.num_heads
    more, wider = heads / model.num_heads, d_model / heads / head_dim(model)
    yield f"num_heads={heads}"
    for name, mixer in model.mixers.items():
        if isinstance(mixer, LinearAttentionConfig):
            own = {"num_heads": more, "key_dim": wider, "value_dim": wider}
            sizes = {key: (getattr(mixer, key), factor) for key, factor in own.items()}
            yield from (f"mixers.{name}.{key}={max(1, round(x * by))}" for key, (x, by) in sizes.items() if x)


def make_pass(mixer: str, shape: Shape, seq_len: int, device: torch.device) -> Callable[[], None]:
    """Build a stack and its input; return its forward and backward, which adds to gradients that exist.

    On a CUDA device weights and activations are bfloat16, except where the model keeps float32.
    """
    blocks = range(1, shape.layers + 1)
    computed = {"recompute": shape.recompute, "compiled": shape.compile, "backend": shape.backend}
    config = replace(configure(mixer, shape), within_documents=shape.documents is not None)
    ids = None if shape.documents is None else _document_ids(shape, seq_len)
    stack = Model(config, blocks=blocks, **computed).to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    stack.to_precision(dtype)
    x = torch.randn(seq_len, shape.batch, config.d_model, device=device, dtype=dtype, requires_grad=True)
    weights = torch.randn_like(x)
    for leaf in (x, *stack.parameters()):
        leaf.grad = torch.zeros_like(leaf)

    def forward_and_backward() -> None:
        y, _ = stack(None, hidden=x, document_ids=ids)
        y.backward(weights)

    return forward_and_backward


def _document_ids(shape: Shape, seq_len: int) -> torch.Tensor:
    """Draw where documents begin, the same for every mixer: `[B, T]`."""
    generator = torch.Generator().manual_seed(seq_len)
    begins = torch.zeros(shape.batch, seq_len, dtype=torch.int64)
    for row in begins:
        row[1 + torch.randperm(seq_len - 1, generator=generator)[: max(0, round(seq_len / shape.documents) - 1)]] = 1
    return begins.cumsum(1)
