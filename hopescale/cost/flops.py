"""Floating-point operations of a model per token of training, counted from its config alone. Imports no torch.

A multiply and an add are two operations. Counted are matrix products and triangular solves, inner gradients included;
norms, activations and gates are elementwise and left out. A test holds the counts to what torch executes.
"""

from __future__ import annotations

from collections.abc import Callable

from hopescale.config.model_shape import levels_of_block, mixer_counts, padded_vocab_size
from hopescale.config.schema import MixerConfig, ModelConfig
from hopescale.cost.mixers import COSTS
from hopescale.cost.operation import NOTHING, OpCost, product

_RECOMPUTED = {"memory": ("maps", "mixing"), "block": ("maps", "mixing", "levels")}
"""Parts of a block whose forward the backward runs again; `chunks` and `reverse` are for the mixer to count."""


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Count the model FLOPs of one token's forward and backward, averaged over a sequence of `seq_len` tokens.

    Nothing is added for activations that are computed twice, so that the number measures the model, not the run; of
    causal attention only what a token may see is counted.
    """
    return sum(part.total for part in flops_by_part(model, seq_len).values())


def flops_by_part(
    model: ModelConfig, seq_len: int, *, recompute: Callable[[MixerConfig], str] | None = None, again: float = 0.0
) -> dict[str, OpCost]:
    """Count the operations of one token by part: `maps` of the mixers, their `mixing`, `levels`, `head`.

    What is computed again counts as backward; `recompute` says what by the block's mixer, as `train.recompute` does.
    None counts the model alone. `again` is the part of the tokens whose pieces of sequences run forward once more.
    """
    total = {"maps": NOTHING, "mixing": NOTHING, "levels": NOTHING}
    for mixer, blocks in mixer_counts(model):
        parts = block_flops(model, mixer, seq_len, recompute=recompute and recompute(mixer))
        total = {name: cost + parts[name].times(blocks) for name, cost in total.items()}
    total |= {"head": product(1, model.d_model, padded_vocab_size(model))}
    return {name: cost + OpCost(0, again * cost.forward) for name, cost in total.items()}


def block_flops(
    model: ModelConfig, mixer: MixerConfig, seq_len: int, *, recompute: str | None = None
) -> dict[str, OpCost]:
    """Count the operations of one token in a block by part, `maps`, `mixing` and `levels`; levels cost alike in all.

    Without `recompute`, the value of `train.recompute`, it counts the model alone.
    """
    cost, levels = COSTS[mixer.kind], levels_of_block(model, 0).values()
    parts = {
        "maps": cost.maps(model, mixer),
        "mixing": cost.mixing(model, mixer, seq_len, recompute),
        "levels": sum((product(1, model.d_model, 3 * level.d_ff) for level in levels), NOTHING),
    }
    for name in _RECOMPUTED.get(recompute or "none", ()):
        once = cost.mixing(model, mixer, seq_len, "none") if name == "mixing" else parts[name]
        parts[name] += OpCost(0, once.forward)
    return parts
