"""Documents of a piece of packed sequences: the first may go on from the piece before, and the last in the next one.

The chunks of a document are counted from its first token, wherever pieces end. So what is handed on is the state at the
end of the document's last whole chunk, and the inputs of the tokens behind it. The next piece begins that chunk again,
which gives its tokens the weights, errors and gates of a pass over the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_map

from hopescale.ops.device import to_device
from hopescale.ops.documents import Documents
from hopescale.ops.self_modifying.side_by_side import Pass, gather, places_of, run_whole, scatter, whole_passes
from hopescale.ops.self_modifying.start import MemoryStart
from hopescale.ops.self_modifying.types import Memories, SelfModifyingOutput, Streams


def run_piece(
    run: Callable[..., SelfModifyingOutput],
    streams: Streams,
    before: Memories | None,
    start: Memories | MemoryStart,
    documents: Documents,
    size: int,
) -> SelfModifyingOutput:
    """Run memories over a piece of each sequence.

    Documents that begin and end in the piece are run together. The others are run side by side, whole chunks first.

    Args:
        run: Function of streams and memories that takes `documents`, as `self_modifying` does.
        streams: Streams of the last tokens of the piece before, `size - 1` of them or more, and of the piece.
        before: Memories that the piece before has handed on; None for the first piece of sequences.
        start: Memories that documents begin with, for a batch of one, or the learned weights.
        documents: Documents in the piece.
        size: Tokens after which all memories are at a boundary.

    Returns:
        Answers and statistics of the piece, and the memories to be handed on.
    """
    row, last = streams.k.shape[2], documents.last
    begins, ends, wanted = documents.in_longer_rows(row, size)
    lengths, padding = [end - begin for begin, end in zip(begins, ends, strict=True)], len(streams.k) * row
    cut = {n: lengths[n] for n in sorted({*last, *(n for n, count in enumerate(documents.before) if count)})}
    alone = [n for n in range(len(ends)) if n not in cut]
    whole, rest = whole_passes([cut.get(n, 0) for n in range(len(ends))], size), _rest_pass(cut, size)
    places = [places_of(one, begins, ends, padding) for one in (*whole, *rest)]
    if alone:
        places.append(torch.cat([torch.arange(begins[n], ends[n]) for n in alone])[None])
    parts = gather(streams, places)

    known = Memories(start.expand(1), None) if isinstance(start, MemoryStart) else start
    known = known if before is None else Memories.cat([known, before])
    alive = _picked(known, documents.states(whole[0].numbers)) if whole else known
    outputs, found = run_whole(run, whole, parts, alive)
    short = [n for n in cut if n not in found]
    found |= {n: _picked(known, [state]) for n, state in zip(short, documents.states(short), strict=True)}
    for one, part in zip(rest, parts[len(whole) :], strict=False):
        outputs.append(run(part, Memories.cat([found[n] for n in one.numbers])))
    if alone:
        together = Documents.in_a_row([lengths[n] for n in alone], streams.k.device)
        outputs.append(run(parts[-1], start, documents=together))
    both = list(zip(*outputs, strict=True))[:2]
    y, stats = (scatter(list(of), places, padding, wanted, documents) for of in both)
    return SelfModifyingOutput(y, stats, Memories.cat([found[n] for n in last]).at_boundary())


def _rest_pass(lengths: dict[int, int], size: int) -> list[Pass]:
    """Plan one pass over what documents have behind their whole chunks; the state after it is not used."""
    rests = {n: length % size for n, length in lengths.items() if length % size}
    return [Pass(list(rests), [lengths[n] - rest for n, rest in rests.items()], max(rests.values()))] if rests else []


def _picked(memories: Memories, rows: list[int]) -> Memories:
    """Return the memories of some rows."""
    if len(rows) == 1:
        return tree_map(lambda x: None if x is None else x[rows[0] : rows[0] + 1], memories)
    index = to_device(torch.tensor(rows), memories.memory.running.w_in.device)
    return tree_map(lambda x: None if x is None else x.index_select(0, index), memories)
