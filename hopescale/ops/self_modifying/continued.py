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
    tokens, row = documents.first.shape[1], streams.k.shape[2]

    def place(number: int) -> int:
        """Return the place among all streams of a token of the piece."""
        return number // tokens * row + row - tokens + number % tokens

    last, padding = documents.last, len(streams.k) * row
    earlier, bounds = documents.before, documents.bounds
    begins = [place(begin) - before % size for begin, before in zip(bounds, earlier, strict=False)]
    ends = [place(end - 1) + 1 for end in bounds[1:]]
    cut = sorted({n for n, before in enumerate(earlier) if before} | set(last))
    alone = [n for n in range(len(ends)) if n not in set(cut)]
    lengths = {n: ends[n] - begins[n] for n in cut}

    whole = whole_passes([lengths.get(n, 0) for n in range(len(ends))], size)
    passes = whole + _rests(lengths, size)
    places = [places_of(one, begins, ends, padding) for one in passes]
    if alone:
        places.append(torch.cat([torch.arange(begins[n], ends[n]) for n in alone])[None])
    parts = gather(streams, places)

    fresh = Memories(start.expand(1), None) if isinstance(start, MemoryStart) else start
    rows = {n: bounds[n] // tokens + 1 if earlier[n] else 0 for n in cut}
    known = fresh if before is None else Memories.cat([fresh, before])
    outputs, found = (
        run_whole(run, whole, parts, _picked(known, [rows[n] for n in whole[0].numbers])) if whole else ([], {})
    )
    found = {n: found[n] if n in found else _picked(known, [rows[n]]) for n in cut}
    for one, part in zip(passes[len(whole) :], parts[len(whole) :], strict=False):
        outputs.append(run(part, Memories.cat([found[n] for n in one.numbers])))
    if alone:
        outputs.append(
            run(parts[-1], start, documents=_in_a_row([ends[n] - begins[n] for n in alone], streams.k.device))
        )
    wanted = torch.arange(bounds[-1])
    wanted = wanted // tokens * row + row - tokens + wanted % tokens
    y, stats = (scatter(list(of), places, wanted, documents) for of in list(zip(*outputs, strict=True))[:2])
    return SelfModifyingOutput(y, stats, Memories.cat([found[n] for n in last]).at_boundary())


def _rests(lengths: dict[int, int], size: int) -> list[Pass]:
    """Plan one pass over what documents have behind their whole chunks; the state after it is not used."""
    rests = {n: length % size for n, length in lengths.items() if length % size}
    return [Pass(list(rests), [lengths[n] - rest for n, rest in rests.items()], max(rests.values()))] if rests else []


def _picked(memories: Memories, rows: list[int]) -> Memories:
    index = to_device(torch.tensor(rows), memories.memory.running.w_in.device)
    return tree_map(lambda x: None if x is None else x.index_select(0, index), memories)


def _in_a_row(lengths: list[int], device: torch.device) -> Documents:
    """Return documents of these lengths in one sequence."""
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return Documents.of(ids[None], device)
