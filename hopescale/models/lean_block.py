"""A block of Hope for one vector without gradients, from the weights of its modules."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from hopescale.models.self_modifying import STREAMS, MixerState, SelfModifying
from hopescale.models.state import GroupedState, LayerState
from hopescale.ops.gated_mlps import GatedMlp
from hopescale.ops.hope_block import BlockOfVector, BlockWeights
from hopescale.ops.limits import BLOCK
from hopescale.ops.self_modifying import Memories, can_mix
from hopescale.ops.vectors import can_map, is_plain


class LeanBlock:
    """The way of a single vector through a block whose options one operation knows.

    Parameters are looked up for each vector, because any of them may be replaced, and modules once; what follows from
    the addresses of parameters is kept.
    """

    def __init__(self) -> None:
        self.places: list[tuple[dict[str, Any], str] | None] | None = None
        self.hooks: list[dict] = []
        self.known: tuple[list[int], BlockOfVector | None] = ([], None)

    def run(
        self, block: nn.Module, x: Tensor, state: LayerState | GroupedState | None
    ) -> tuple[Tensor, LayerState] | None:
        """Map one vector of the residual stream `[1, 1, N]`; None if the block has to do that itself."""
        if torch.is_grad_enabled() or x.numel() != x.shape[-1]:
            return None
        if not isinstance(state, LayerState) or not can_map(x):
            return None
        if self.places is None:
            self.places, self.hooks = _places(block, x), [each for part in block.modules() for each in _hooks(part)]
        if not self.places or any(self.hooks):
            return None
        weights = [None if place is None else place[0][place[1]] for place in self.places]
        addresses = [0 if weight is None else weight.data_ptr() for weight in weights]
        known, operation = self.known
        if addresses != known:
            operation = _operation(block.mixer, weights)
            self.known = addresses, operation
        if operation is None:
            return None
        position, (*memories, _, tail, ahead) = state
        if ahead is not None:
            return None
        memories, place = block.mixer.begun(Memories(*memories), position, tokens=1, batch=1)
        y, memories, tail = operation.run(x, memories, tail, place)
        return y, LayerState(position + 1, MixerState(*memories, None, tail))


def _hooks(module: nn.Module) -> tuple[dict, dict]:
    return module._forward_hooks, module._forward_pre_hooks


def _places(block: nn.Module, x: Tensor) -> list[tuple[dict[str, Any], str] | None]:
    """Return where a block's weights are, in the order of `BlockOfVector`; nothing if that lacks an option."""
    mixer, cms = block.mixer, block.cms
    if type(mixer) is not SelfModifying or not cms.sequential or mixer.in_proj.tp_group.size() > 1:
        return []
    odd = any(level.gate.weight.shape[0] % BLOCK for level in cms.levels.values())
    if odd or mixer.far_spec is not None:
        return []
    if not can_mix(x.new_empty(1, mixer.head_dim), mixer.spec, mixer.computed["backend"]):
        return []
    gates = [dict(mixer.gates.items()).get(name) for name in ("eta", "alpha", "mu")]
    mixing = [(block.norm, "weight"), (mixer.in_proj, "weight"), (mixer.out_proj, "weight"), (mixer.conv, "weight")]
    mixing += [(mixer.norm, "weight"), *((gate, name) for name in ("bias", "weight") for gate in gates)]
    parts = chain.from_iterable([getattr(level, name) for name in GatedMlp._fields] for level in cms.levels.values())
    places = [*mixing, *((part, "weight") for part in parts)]
    return [
        (module._parameters, name) if module is not None and name in module._parameters else None
        for module, name in places
    ]


def _operation(mixer: SelfModifying, weights: list[Tensor | None]) -> BlockOfVector | None:
    """Return the operation with these weights; None if it cannot take them."""
    if not all(weight is None or is_plain(weight) for weight in weights):
        return None
    count = len(BlockWeights._fields)
    unit = [name != "v" or mixer.config.targets != "value" for name in STREAMS]
    return BlockOfVector(BlockWeights(*weights[:count]), weights[count:], mixer.spec, unit, mixer.norm.eps)
