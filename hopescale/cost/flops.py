"""Floating-point operations of a model per token of training, counted from its config alone. Imports no torch.

A multiply and an add are two operations. Counted are matrix products and triangular solves, inner gradients included;
norms, activations and gates are elementwise and left out. A test holds the counts to what torch executes.
"""

from __future__ import annotations

from typing import Literal

from hopescale.config.model_shape import has_chunk_loop, head_dim, kv_heads, levels_of_block, padded_vocab_size
from hopescale.config.schema import ModelConfig
from hopescale.cost.chunk_flops import memory_flops
from hopescale.cost.inventory import num_projections
from hopescale.cost.operations import NOTHING, Flops, product

Recompute = Literal["none", "chunks", "reverse", "memory", "block"]


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Count the model FLOPs of one token's forward and backward, averaged over a sequence of `seq_len` tokens.

    Nothing is added for activations that are computed twice, so that the number measures the model, not the run; of
    causal attention only what a token may see is counted.
    """
    return sum(part.total for part in flops_by_part(model, seq_len).values())


def flops_by_part(model: ModelConfig, seq_len: int, *, recompute: Recompute | None = None) -> dict[str, Flops]:
    """Count the operations of one token by part: `maps` of the mixers, their `mixing`, `levels`, `head`.

    Args:
        model: Sizes and switches.
        seq_len: Tokens per sequence.
        recompute: What is computed again in the backward pass and counted with it; None counts the model alone.
    """
    head = product(1, model.d_model, padded_vocab_size(model))
    again = {"memory": ("maps", "mixing"), "block": ("maps", "mixing", "levels")}.get(recompute or "none", ())
    block = {"maps": _maps(model), "mixing": _mixing(model, seq_len, recompute), "levels": _levels(model)}
    once = block | {"mixing": _mixing(model, seq_len, None)}
    parts = {
        name: Flops(flops.forward, flops.backward + (name in again) * once[name].forward).times(model.num_layers)
        for name, flops in block.items()
    }
    return parts | {"head": head}


def block_flops(model: ModelConfig, seq_len: int) -> Flops:
    """Count one block for a token, which costs the same in all blocks."""
    return _maps(model) + _mixing(model, seq_len, None) + _levels(model)


def _levels(model: ModelConfig) -> Flops:
    """Count one block's levels: three products each."""
    return sum((product(1, model.d_model, 3 * level.d_ff) for level in levels_of_block(model, 0).values()), NOTHING)


def _maps(model: ModelConfig) -> Flops:
    """Count the mixer's maps in and out."""
    width = model.num_heads * head_dim(model)
    if model.mixer == "attention":
        return product(1, model.d_model, 2 * width + 2 * kv_heads(model) * head_dim(model))
    return product(1, model.d_model, width * (num_projections(model) + 1))


def _mixing(model: ModelConfig, seq_len: int, recompute: Recompute | None) -> Flops:
    """Count what a mixer does between its maps: scores and reads, or memories."""
    if model.mixer == "attention":
        # A token sees (seq_len + 1) / 2 on average. Each gradient is two products; the scores are a third.
        seen = product(1, head_dim(model), (seq_len + 1) / 2).times(2 * model.num_heads)
        return seen if recompute is None else Flops(seen.forward, 2.5 * seen.forward)
    again = recompute not in (None, "none") and has_chunk_loop(model.self_modifying)
    replay = recompute == "reverse"
    return memory_flops(model, seq_len, recompute=again, replay=replay).times(model.num_heads / seq_len)
