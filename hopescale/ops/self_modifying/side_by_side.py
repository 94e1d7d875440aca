"""Documents of packed sequences as sequences of a batch, for code that runs sequences of one length.

All documents go along together, chunk after chunk, and one that has no whole chunk left drops out. What is left of
each, less than a chunk, is run in the end, padded to one of few lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hopescale.ops.device import to_device
from hopescale.ops.documents import Documents
from hopescale.ops.self_modifying.types import Memories, SelfModifyingOutput, Streams

Run = Callable[[Streams, Memories], SelfModifyingOutput]
"""Runs memories over sequences `[B, H, T, ...]` that begin with a chunk."""


MOST_RESTS = 64
"""Documents whose rests are run together, at most: each has memories of its own."""


class Pass(NamedTuple):
    """Documents run together: each from its token `start` on, for `tokens` tokens, padded where it has fewer."""

    numbers: Sequence[int]
    starts: Sequence[int]
    tokens: int


def whole_passes(lengths: Sequence[int], size: int) -> list[Pass]:
    """Plan the passes over whole chunks of `size` tokens; each has the first documents of the one before it."""
    counts, done, passes = [length // size for length in lengths], 0, []
    order = sorted(range(len(counts)), key=lambda number: -counts[number])
    for count in sorted(set(counts) - {0}):
        numbers = [number for number in order if counts[number] >= count]
        passes.append(Pass(numbers, [done * size] * len(numbers), (count - done) * size))
        done = count
    return passes


def _rest_passes(documents: Documents, size: int) -> list[Pass]:
    """Plan the passes over the rests of documents after whole chunks.

    A document that ends its sequence is not padded, so that the state after it is that after its last token. Documents
    without a whole chunk keep to themselves: they begin with one state.
    """
    last, alike = set(documents.last), {}
    for number, length in enumerate(documents.lengths):
        if left := length % size:
            tokens = left if number in last else min(size, 1 << (left - 1).bit_length())
            alike.setdefault((tokens, left == length), []).append((number, length - left))
    return [
        Pass(*zip(*members[begin : begin + MOST_RESTS], strict=True), tokens)
        for (tokens, _), members in sorted(alike.items())
        for begin in range(0, len(members), MOST_RESTS)
    ]


def places_of(one: Pass, begins: Sequence[int], ends: Sequence[int], padding: int) -> Tensor:
    """Return where a pass finds its tokens among all of them `[N, T]`, given where documents begin and end."""
    starts = torch.tensor([begins[number] for number in one.numbers]) + torch.tensor(one.starts)
    stops = torch.tensor([ends[number] for number in one.numbers])
    places = starts[:, None] + torch.arange(one.tokens)
    return torch.where(places < stops[:, None], places, padding)


def run_side_by_side(
    run: Run, streams: Streams, state: Memories, documents: Documents, size: int
) -> SelfModifyingOutput:
    """Run memories over the documents of packed sequences.

    Padding has keys of zero, so that it writes nothing, and comes after what a document reads.

    Args:
        run: Function that runs memories over sequences.
        streams: Streams of the packed sequences.
        state: Memories that each document begins with, for a batch of one.
        documents: Documents in the sequences.
        size: Tokens after which all memories are at a boundary.
    """
    whole, rest = whole_passes(documents.lengths, size), _rest_passes(documents, size)
    bounds, last = documents.bounds, set(documents.last)
    places = [places_of(one, bounds[:-1], bounds[1:], bounds[-1]) for one in (*whole, *rest)]
    parts = gather(streams, places)
    outputs, found = run_whole(run, whole, parts, state.expand(len(whole[0].numbers)) if whole else state)
    for one, part in zip(rest, parts[len(whole) :], strict=True):
        count = len(one.numbers)
        output = run(part, Memories.cat([found[n] for n in one.numbers]) if one.starts[0] else state.expand(count))
        outputs.append(output)
        found |= {n: after for n, after in zip(one.numbers, output.state.split([1] * count), strict=True) if n in last}
    wanted = torch.arange(bounds[-1])
    y, stats = (scatter(list(of), places, bounds[-1], wanted, documents) for of in list(zip(*outputs, strict=True))[:2])
    return SelfModifyingOutput(y, stats, Memories.cat([found[number] for number in documents.last]))


def run_whole(
    run: Run, passes: Sequence[Pass], parts: Sequence[Streams], alive: Memories
) -> tuple[list[SelfModifyingOutput], dict[int, Memories]]:
    """Run the passes over whole chunks, from the memories of the first one's documents.

    Returns:
        What each pass gives, and the memories after the whole chunks of each document.
    """
    outputs, found = [], {}
    for index, (one, part) in enumerate(zip(passes, parts, strict=False)):
        output = run(part, alive)
        outputs.append(output)
        going = len(passes[index + 1].numbers) if index + 1 < len(passes) else 0
        alive, ended = output.state.split([going, len(one.numbers) - going])
        found |= zip(one.numbers[going:], ended.split([1] * (len(one.numbers) - going)), strict=True)
    return outputs, found


def gather(streams: Streams, places: list[Tensor]) -> list[Streams]:
    """Return the streams of each pass; padding is zero."""
    index = to_device(torch.cat([each.flatten() for each in places]), streams.k.device)
    sizes = [each.numel() for each in places]

    def parts(x: Tensor | None) -> list[Tensor | None]:
        if x is None:
            return [None] * len(places)
        rows = x.transpose(1, 2).flatten(0, 1)  # [B * T, H, ...]
        rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])]).index_select(0, index)
        return [
            part.unflatten(0, each.shape).transpose(1, 2) for part, each in zip(rows.split(sizes), places, strict=True)
        ]

    return [Streams(*part) for part in zip(*map(parts, streams), strict=True)]


def scatter(outputs: list[Tensor], places: list[Tensor], padding: int, wanted: Tensor, documents: Documents) -> Tensor:
    """Put the outputs `[N, H, T, ...]` of passes back to where their tokens lie: `[B, H, T, ...]`.

    The tokens of the documents lie at the places `wanted`, in order; none lies at or behind that of `padding`.
    """
    index = torch.cat([each.flatten() for each in places])
    origin = torch.empty(padding + 1, dtype=torch.int64)
    origin[index] = torch.arange(len(index))
    rows = torch.cat([each.transpose(1, 2).flatten(0, 1) for each in outputs])
    rows = rows.index_select(0, to_device(origin[wanted], rows.device))
    return rows.unflatten(0, documents.first.shape).transpose(1, 2)
