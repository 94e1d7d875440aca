"""Floating-point operations of a model per token of training, counted from its config alone. Imports no torch.

A multiply and an add are two operations. Counted are matrix products and triangular solves, inner gradients included;
norms, activations and gates are elementwise and left out. A test holds the counts to what torch executes.
"""

from __future__ import annotations

from hopescale.config.model_shape import levels_of_block, padded_vocab_size
from hopescale.config.schema import ModelConfig
from hopescale.cost.mixers import maps_cost, mixing_cost
from hopescale.cost.operation import NOTHING, OpCost, product

_RECOMPUTED = {"memory": ("maps", "mixing"), "block": ("maps", "mixing", "levels")}
"""Parts of a block whose forward the backward runs again; `chunks` and `reverse` are for the mixer to count."""


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Count the model FLOPs of one token's forward and backward, averaged over a sequence of `seq_len` tokens.

    Nothing is added for activations that are computed twice, so that the number measures the model, not the run; of
    causal attention only what a token may see is counted.
    """
    return sum(part.total for part in flops_by_part(model, seq_len).values())


def flops_by_part(model: ModelConfig, seq_len: int, *, recompute: str | None = None) -> dict[str, OpCost]:
    """Count the operations of one token by part: `maps` of the mixers, their `mixing`, `levels`, `head`.

    What `train.recompute` repeats counts as backward; a `recompute` of None counts the model alone.
    """
    parts = _block(model, seq_len, recompute)
    for name in _RECOMPUTED.get(recompute or "none", ()):
        parts[name] += OpCost(0, _block(model, seq_len, "none")[name].forward)
    head = product(1, model.d_model, padded_vocab_size(model))
    return {name: part.times(model.num_layers) for name, part in parts.items()} | {"head": head}


def block_flops(model: ModelConfig, seq_len: int) -> OpCost:
    """Count one block for a token, which costs the same in all blocks."""
    return sum(_block(model, seq_len, None).values(), NOTHING)


def _block(model: ModelConfig, seq_len: int, recompute: str | None) -> dict[str, OpCost]:
    levels = levels_of_block(model, 0).values()
    return {
        "maps": maps_cost(model),
        "mixing": mixing_cost(model, seq_len, recompute),
        "levels": sum((product(1, model.d_model, 3 * level.d_ff) for level in levels), NOTHING),
    }
