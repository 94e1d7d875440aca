"""Memories that start anew every so many tokens, so that the pieces of a sequence do not wait for one another.

This is the local memory of TNT (arXiv 2511.07343, section 3), whose shards are the pieces here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hopescale.ops.documents import Documents
from hopescale.ops.self_modifying.types import Memories, SelfModifyingOutput, Streams


def run_with_resets(
    run: Callable[..., SelfModifyingOutput],
    streams: Streams,
    state: Memories,
    fresh: Memories,
    *,
    every: int,
    position: int,
) -> SelfModifyingOutput:
    """Run memories over a sequence in pieces that begin where the number of tokens before is a multiple of `every`.

    A sequence split anywhere equals one pass.

    Args:
        run: Function of streams and memories that takes `position` and `documents`, as `self_modifying` does.
        streams: Streams of the sequences.
        state: Memories before the first token; unused where a piece begins with it.
        fresh: Memories that each piece begins with, for a batch of one.
        every: Tokens of a piece, and so the distance between two resets.
        position: Tokens that came before.
    """
    (batch, _, tokens, _), place = streams.k.shape, position % every
    begun = min(tokens, every - place)
    if begun == tokens:
        return run(streams, state if place else fresh.expand(batch), position=place)
    if place == 0:
        return run(streams, fresh, documents=Documents.whole(batch, tokens, streams.k.device).cut(every))
    first, rest = streams.split([begun, tokens - begun])
    y, stats, _ = run(first, state, position=place)
    later = run_with_resets(run, rest, state, fresh, every=every, position=0)
    return SelfModifyingOutput(torch.cat([y, later.y], dim=2), torch.cat([stats, later.stats], dim=2), later.state)
