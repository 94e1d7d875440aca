"""Which size of a recipe's family a budget of training FLOPs is best spent on, by a scaling law. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from hopescale.common.errors import ConfigError
from hopescale.config.check import require_valid
from hopescale.config.load import load_recipe
from hopescale.config.model_shape import attention_mixers, head_dim
from hopescale.config.schema import ModelConfig
from hopescale.cost.flops import flops_per_token
from hopescale.cost.params import count_params
from hopescale.scaling.law import Law

WIDEST = 32_768
"""Widths that are looked at, at most."""
FF_MULTIPLE = 16
"""Level widths are rounded to a multiple of this."""


def best_size(recipe: str, overrides: Sequence[str], flops: float, law: Law) -> dict[str, Any]:
    """Return the member of a recipe's family with the least predicted loss for a budget.

    A member has another number of heads of the same width; the model's width, its layers and its levels' widths follow
    in proportion. Its tokens are the budget over the FLOPs per token that the member really takes.

    Raises:
        ConfigError: If the budget buys no step, or the best size is beyond the widths that are looked at.
    """
    config = require_valid(load_recipe(recipe, overrides)).config
    best: dict[str, Any] = {}
    members = list(family(config.model))
    for settings, model in members:
        params, each = count_params(model)["total"], flops_per_token(model, config.train.seq_len)
        tokens = flops / each
        loss = law.loss(params, tokens)
        if not best or loss < best["loss"]:
            steps = max(1, round(tokens / config.train.global_batch_tokens))
            best = {
                "flops": flops,
                "parameters": params,
                "tokens": tokens,
                "loss": loss,
                "flops_per_token": each,
                "settings": settings | {"train.steps": steps},
            }
    if 2 * best["tokens"] < (batch := config.train.global_batch_tokens):
        message = f"--flops {flops:.3g} buys {best['tokens']:.3g} tokens, less than half a step of {batch:,}"
        raise ConfigError(message, "give more FLOPs, or set a smaller train.global_batch_tokens")
    if best["settings"]["model.d_model"] == members[-1][1].d_model:
        raise ConfigError(f"--flops {flops:.3g} asks for a model wider than {WIDEST}", "give fewer FLOPs")
    return best


def family(model: ModelConfig) -> Iterator[tuple[dict[str, int], ModelConfig]]:
    """Yield smaller and larger models of one shape, narrow to wide, with the settings that make them."""
    dim, shared = head_dim(model), {name: mixer.num_kv_heads for name, mixer in attention_mixers(model).items()}
    groups = {name: model.num_heads // kv for name, kv in shared.items() if kv}
    group = math.lcm(*groups.values())
    for heads in range(group, WIDEST // dim + 1, group):
        ratio = heads / model.num_heads
        layers = max(1, round(model.num_layers * ratio))
        width = model.d_model * heads // model.num_heads
        widths = {
            name: max(FF_MULTIPLE, round(level.d_ff * ratio / FF_MULTIPLE) * FF_MULTIPLE)
            for name, level in model.cms.levels.items()
        }
        levels = {name: replace(level, d_ff=widths[name]) for name, level in model.cms.levels.items()}
        settings = {"model.d_model": width, "model.num_heads": heads, "model.num_layers": layers}
        settings |= {f"model.cms.levels.{name}.d_ff": d_ff for name, d_ff in widths.items()}
        settings |= {f"model.mixers.{name}.num_kv_heads": heads // each for name, each in groups.items()}
        mixers = {name: replace(model.mixers[name], num_kv_heads=heads // each) for name, each in groups.items()}
        changed = {"cms": replace(model.cms, levels=levels), "mixers": model.mixers | mixers}
        yield settings, replace(model, d_model=width, num_heads=heads, num_layers=layers, **changed)
