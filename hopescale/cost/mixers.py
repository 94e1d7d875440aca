"""Cost of every kind of mixer: the one file of `cost` that a new kind is added to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from hopescale.cost.attention import attention_activations, attention_maps, attention_mixing, attention_parameters
from hopescale.cost.linear_attention import (
    linear_attention_activations,
    linear_attention_maps,
    linear_attention_mixing,
    linear_attention_parameters,
)
from hopescale.cost.micro_batch import Activations
from hopescale.cost.operation import OpCost
from hopescale.cost.parameter import ParameterShape
from hopescale.cost.self_modifying import (
    self_modifying_activations,
    self_modifying_maps,
    self_modifying_mixing,
    self_modifying_parameters,
)
from hopescale.cost.titans import titans_activations, titans_maps, titans_mixing, titans_parameters
from hopescale.cost.ttt import ttt_activations, ttt_maps, ttt_mixing, ttt_parameters


class MixerCost(NamedTuple):
    """Counts of a kind of mixer; each takes the model and the mixer's settings first.

    Attributes:
        parameters: Parameters of a mixer, by their names in it.
        maps: Operations of the maps in and out for a token.
        mixing: Operations between the maps for a token, given the tokens of a sequence and `train.recompute`, which is
            None where the model alone is counted.
        activations: Bytes that are kept for the backward, without the norm's result, given the micro batch and what the
            mixer itself computes again.
    """

    parameters: Callable[..., Iterator[ParameterShape]]
    maps: Callable[..., OpCost]
    mixing: Callable[..., OpCost]
    activations: Callable[..., Activations]


COSTS: dict[str, MixerCost] = {
    "attention": MixerCost(attention_parameters, attention_maps, attention_mixing, attention_activations),
    "linear_attention": MixerCost(
        linear_attention_parameters, linear_attention_maps, linear_attention_mixing, linear_attention_activations
    ),
    "self_modifying": MixerCost(
        self_modifying_parameters, self_modifying_maps, self_modifying_mixing, self_modifying_activations
    ),
    "titans": MixerCost(titans_parameters, titans_maps, titans_mixing, titans_activations),
    "ttt": MixerCost(ttt_parameters, ttt_maps, ttt_mixing, ttt_activations),
}
"""The counts of each kind."""
