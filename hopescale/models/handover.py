"""States that a piece of a sequence gets from the piece before it on another rank, layer by layer, and hands on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hopescale.models.attention import Attention, AttentionCache
from hopescale.models.self_modifying import SelfModifying
from hopescale.models.state import LayerState
from hopescale.models.titans import Titans
from hopescale.ops.documents import Documents
from hopescale.parallel.relay import Relay

BOUNDARY, RUNNING = "/boundary/", "/running/"
"""Names of what memories held when the present chunk began, and of what they hold now. Pieces end with a chunk, so the
first is not handed on: the next chunk begins with the second."""


class Handover:
    """States at the two ends of a piece, for one forward pass and for those that compute its activations again.

    Args:
        relay: This rank's part of the ring.
        position: Tokens of the sequence before the piece.
        tokens: Tokens of the piece.
        is_last: Whether the sequence ends with the piece.
        within_documents: Whether the model mixes so.
    """

    def __init__(self, relay: Relay, position: int, tokens: int, *, is_last: bool, within_documents: bool):
        self.relay, self.position, self.tokens = relay, position, tokens
        self.is_last, self.within = is_last, within_documents
        self._received: dict[int, list[Tensor]] = {}
        self._is_over = False

    def close(self) -> None:
        """End the forward pass: from now on nothing is sent, and received states are returned again."""
        self._is_over = True

    def enter(self, x: Tensor, mixer: nn.Module, number: int) -> tuple[Tensor, LayerState | None]:
        """Return the state before the first token in the mixer of a block; None where the sequence begins.

        Also returns `x`, the residual stream in front of the block.
        """
        if self.position == 0:
            return x, None
        fresh = state_after(mixer, x.shape[1], self.position, within_documents=self.within)
        given = {name: tensor for name, tensor in fresh.named().items() if BOUNDARY not in name}
        x, tensors = self.relay.receive(x, list(given.values()), number, self._received.get(number))
        self._received[number] = [tensor.detach() for tensor in tensors]
        known = dict(zip(given, tensors, strict=True))
        return x, fresh.with_named({name: known[name.replace(BOUNDARY, RUNNING)] for name in fresh.named()})

    def sequences(self, x: Tensor, mixer: nn.Module) -> Documents | None:
        """Return each sequence as one document for a mixer whose chunks do not end where pieces do; None for others."""
        if not is_prefixed(mixer):
            return None
        ids, begun = torch.zeros(x.shape[1], self.tokens), torch.full((x.shape[1], 1), self.position)
        return Documents.of(ids, x.device, begun)

    def leave(self, x: Tensor, state: LayerState, mixer: nn.Module, number: int) -> Tensor:
        """Hand on the state of a block's mixer after the last token; returns `x`, the stream behind the block."""
        if self.is_last:
            return x
        with torch.no_grad():
            like = state_after(mixer, x.shape[1], state.position, within_documents=self.within).named()
        tensors = [tensor.to(like[name].dtype) for name, tensor in state.named().items() if BOUNDARY not in name]
        return self.relay.send(x, tensors, number, again=self._is_over)


def state_after(mixer: nn.Module, batch: int, position: int, *, within_documents: bool) -> LayerState:
    """Return a state like a mixer's after a piece that ends after so many tokens, but with initial values."""
    prefixed = is_prefixed(mixer)
    if prefixed or (within_documents and isinstance(mixer, (SelfModifying, Titans))):
        state = mixer.initial_state(batch, unfinished=True)
    else:
        state = mixer.initial_state(batch)
    if prefixed:
        seen = mixer.tokens_in_sight(position)
        return LayerState(position, state.tensors._replace(attention=_of_tokens(state.tensors.attention, seen)))
    if not isinstance(mixer, Attention):
        return state._replace(position=position)
    return LayerState(position, _of_tokens(state.tensors, min(position, mixer.config.window or position)))


def is_prefixed(mixer: nn.Module) -> bool:
    """Tell whether a mixer's chunks count persistent tokens: pieces end within chunks, as with documents."""
    return isinstance(mixer, Titans) and mixer.config.composition != "mac"


def _of_tokens(cache: AttentionCache, tokens: int) -> AttentionCache:
    batch, groups, _, dim = cache.k.shape
    k = cache.k.new_empty(batch, groups, tokens, dim)
    return AttentionCache(k, k)
