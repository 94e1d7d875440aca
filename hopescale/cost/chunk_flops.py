"""Operations of a self-modifying mixer's memories, chunk by chunk, as `ops.delta_rule` and `models.memory` run them.

Counted are matrix products and triangular solves of one head and one sequence. What is elementwise is left out. Letters
are those of `models.memory`: `C` tokens of a chunk, `D` width of a head, `E` hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

from hopescale.config.model_shape import has_chunk_loop, head_dim, memory_banks, memory_dim, projection_chunk_size
from hopescale.config.schema import ModelConfig, SelfModifyingConfig
from hopescale.cost.operations import NOTHING, Flops, product, solve
from hopescale.ops.limits import REVERSE_PARTS, is_moved_by_map, is_trace_smaller


@dataclass(frozen=True)
class Bank:
    """Memories of one head that are written at the same boundaries.

    Attributes:
        vector_memories: Memories that answer with vectors.
        gate_memories: Memories that answer with one number.
        dim: `D`.
        hidden: `E` of MLP memories; None if they are linear.
        is_main: Whether the first vector memory is the memory that is read.
    """

    vector_memories: int
    gate_memories: int
    dim: int
    hidden: int | None
    is_main: bool

    @property
    def rows(self) -> int:
        """Outputs of one wide first layer."""
        return self.hidden or self.dim

    @property
    def first(self) -> int:
        """Outputs of all first layers."""
        return self.vector_memories * self.rows + self.gate_memories * (self.hidden or 1)

    @property
    def size(self) -> int:
        """Entries of all weights."""
        second = 0 if self.hidden is None else self.hidden * (self.vector_memories * self.dim + self.gate_memories)
        return self.dim * self.first + second

    @property
    def layers(self) -> list[tuple[int, int, int]]:
        """Inputs, outputs and number of the linear layers: the first ones, side by side, and the second ones."""
        first = [(self.dim, self.first, 1)]
        if self.hidden is None:
            return first
        return [*first, (self.hidden, self.dim, self.vector_memories), (self.hidden, 1, self.gate_memories)]

    @property
    def num_retrieved(self) -> int:
        """Vector memories that make keys, values or queries."""
        return self.vector_memories - self.is_main


def banks(model: ModelConfig) -> list[Bank]:
    """Return the banks of a head, the one with the main memory first."""
    result = []
    for names in memory_banks(model).values():
        num_gates = sum(name in ("eta", "alpha") for name in names)
        sizes = (len(names) - num_gates, num_gates, head_dim(model), memory_dim(model))
        result.append(Bank(*sizes, is_main=names[0] == "mem"))
    return result


def memory_flops(model: ModelConfig, seq_len: int, *, recompute: bool = False, replay: bool = False) -> Flops:
    """Count a head's memories over a sequence, learned initial state to last token.

    Args:
        model: Sizes and switches.
        seq_len: Tokens.
        recompute: Whether the backward pass computes every chunk again.
        replay: Whether it computes the states at their starts again, too.
    """
    mixer = model.self_modifying
    if not has_chunk_loop(mixer):
        return _whole_sequence(model, seq_len)
    total, (size, count) = NOTHING, (projection_chunk_size(model), -(-seq_len // projection_chunk_size(model)))
    for index in range(count) if count < 3 else (0, 1, count - 1):
        tokens = min(size, seq_len - index * size)
        part = _part(model, tokens, first=index == 0 and not recompute, last=index == count - 1)
        total += part.times(count - 2 if index == 1 and count > 2 else 1)
    again = recompute * total.forward + replay * _replay(model, size, count)
    return Flops(total.forward, total.backward + again)


def _replay(model: ModelConfig, tokens: int, count: int) -> float:
    """Count what finds again the states at the starts of `count` chunks, all but the last of them of `tokens`."""
    mixer, bank = model.self_modifying, banks(model)[-1]
    rule = {"momentum": mixer.momentum, "erase": mixer.inner_rule == "dgd"}
    layers = [layer for layer in bank.layers if is_trace_smaller(tokens, *layer[:2], **rule)]
    once = sum(number * _add(mixer, tokens, width, out, True).forward for width, out, number in layers)
    return once * sum(_follows(min(REVERSE_PARTS, count - first) - 1) for first in range(0, count, REVERSE_PARTS))


def _follows(traces: int) -> int:
    """Count how often a trace is followed to have the states after so many in a row, as `ops.scan` halves the row."""
    if not traces:
        return 0
    half = (traces + 1) // 2
    return half + _follows(traces - half) + _follows(half - 1)


def _part(model: ModelConfig, tokens: int, *, first: bool, last: bool) -> Flops:
    """Count a projection chunk: its projections made, the main memory's chunks, and all writes."""
    mixer, all_banks = model.self_modifying, banks(model)
    source = all_banks[-1]
    flops = _retrieve(source, source.num_retrieved, tokens)
    size = mixer.chunk_size if len(all_banks) > 1 else tokens
    count = -(-tokens // size)
    for index in range(count):
        begin, end = first and index == 0, last and index == count - 1
        flops += _move(mixer, all_banks[0], min(size, tokens - index * size), begin, end, reads=True)
    if len(all_banks) > 1:
        flops += _move(mixer, source, tokens, first, last, reads=False)
    return flops


def _retrieve(bank: Bank, count: int, tokens: int) -> Flops:
    """Count the answers of vector memories and of all gate memories to their inputs."""
    flops = product(tokens, bank.dim, bank.rows).times(count)
    if bank.gate_memories:
        flops += product(tokens, bank.dim, bank.gate_memories * (bank.hidden or 1))
    return flops if bank.hidden is None else flops + product(tokens, bank.hidden, bank.dim).times(count)


def _move(mixer: SelfModifyingConfig, bank: Bank, tokens: int, first: bool, last: bool, *, reads: bool) -> Flops:
    """Count a bank's chunk: tables, writes, and its memories moved and read.

    Args:
        mixer: Switches.
        bank: Memories.
        tokens: `C`.
        first: Whether the momentum is the one it starts with, which gets no gradient.
        last: Whether the state after the chunk is read by nobody, and gets no gradient.
        reads: Whether the first memory answers queries.
    """
    uses_chunk = reads and mixer.read != "boundary"
    shared = _tables(mixer, tokens) + _writes(mixer, bank, bank.vector_memories, tokens, with_first=True)
    shared += sum((_open(mixer, tokens, width).times(count) for width, _, count in bank.layers[:2]), NOTHING)
    unread = NOTHING
    if bank.hidden is not None and bank.gate_memories:
        unread = _writes(mixer, bank, bank.gate_memories, tokens, with_first=False, out=1)
        unread += _open(mixer, tokens, bank.hidden).times(bank.gate_memories)
    unread += sum((_after(mixer, tokens, width, out, first).times(n) for width, out, n in bank.layers), NOTHING)
    if not uses_chunk:
        shared, unread = NOTHING, shared + unread
    read = NOTHING
    if reads and not uses_chunk:
        read = _retrieve(Bank(1, 0, bank.dim, bank.hidden, True), 1, tokens)
    elif reads:
        for width, out in ((bank.dim, bank.rows), (bank.hidden, bank.dim))[: 1 + (bank.hidden is not None)]:
            read += _values(mixer, tokens, width, out, first) + _read(mixer, tokens, width, out, first)
    return shared + read + (unread.without_backward() if last else unread)


def _tables(mixer: SelfModifyingConfig, tokens: int) -> Flops:
    if not mixer.momentum:
        return NOTHING
    return product(tokens + 1, tokens, tokens) + product(tokens + 1, tokens, 1)


def _writes(
    mixer: SelfModifyingConfig, bank: Bank, memories: int, tokens: int, *, with_first: bool, out: int | None = None
) -> Flops:
    """Count what memories write: first layers at keys and targets, the error, and its way back through the second."""
    own = mixer.targets == "self"
    flops = product((1 + own) * tokens, bank.dim, bank.first) if with_first else NOTHING
    if bank.hidden is None:
        return flops
    asks = 1 if mixer.objective == "l2" or own else 0
    return flops + product(tokens, bank.hidden, out or bank.dim).times(memories * (1 + asks))


def _open(mixer: SelfModifyingConfig, tokens: int, width: int) -> Flops:
    """Count the keys' similarities and the solve for what they erase."""
    if mixer.inner_rule != "dgd":
        return NOTHING
    return product(tokens, width, tokens) + solve(tokens, width)


def _after(mixer: SelfModifyingConfig, tokens: int, width: int, out: int, first: bool) -> Flops:
    """Count a layer's state after a chunk, `width` inputs to `out` outputs."""
    if is_moved_by_map(tokens, width, out, momentum=mixer.momentum):
        return _transition(mixer, tokens, width) + _add(mixer, tokens, width, out, first)
    return _values(mixer, tokens, width, out, first) + _add(mixer, tokens, width, out, first)


def _add(mixer: SelfModifyingConfig, tokens: int, width: int, out: int, first: bool) -> Flops:
    """Count how what enters a layer in a chunk is added."""
    momentum, erase = mixer.momentum, mixer.inner_rule == "dgd"
    entering = product(width, tokens, out)
    if is_moved_by_map(tokens, width, out, momentum=momentum):
        pushed = product(width, width, out, gradients=1 if first else 2) + entering
        return entering + product(width, width, out) + pushed.times(momentum)
    return entering.times(1 + momentum + (momentum and erase))


def _transition(mixer: SelfModifyingConfig, tokens: int, width: int) -> Flops:
    if mixer.inner_rule != "dgd":
        return NOTHING
    flops = product(width, tokens, width)
    return flops + (product(width, tokens, width) + product(width, tokens, tokens)).times(mixer.momentum)


def _values(mixer: SelfModifyingConfig, tokens: int, width: int, out: int, first: bool) -> Flops:
    """Count what keys read of the state at the chunk's start, and of what was written since."""
    if mixer.inner_rule != "dgd":
        return NOTHING
    flops = _initial_reads(mixer, tokens, width, out, first)
    return flops + product(tokens, tokens, out).times(mixer.momentum)


def _initial_reads(mixer: SelfModifyingConfig, tokens: int, width: int, out: int, first: bool) -> Flops:
    push = product(tokens, width, out, gradients=1 if first else 2)
    return product(tokens, width, out) + push.times(mixer.momentum)


def _read(mixer: SelfModifyingConfig, tokens: int, width: int, out: int, first: bool) -> Flops:
    """Count a read inside a chunk: of the state at its start, of writes and of erases since."""
    erase = mixer.inner_rule == "dgd"
    flops = product(tokens, width, tokens) + _initial_reads(mixer, tokens, width, out, first)
    flops += solve(tokens, tokens).times(erase)
    return flops + product(tokens, tokens, out).times(1 + (erase and mixer.momentum))


def _whole_sequence(model: ModelConfig, seq_len: int) -> Flops:
    """Count a linear memory that stores static values: all chunks at once, but for the states between them."""
    mixer, dim = model.self_modifying, head_dim(model)
    whole, rest = divmod(seq_len, mixer.chunk_size)
    total = NOTHING
    for tokens, count in ((mixer.chunk_size, whole), (rest, 1 if rest else 0)):
        if not count:
            continue
        each = _tables(mixer, tokens) + _open(mixer, tokens, dim) + _transition(mixer, tokens, dim)
        each += product(dim, tokens, dim).times(1 + mixer.momentum)
        each += _values(mixer, tokens, dim, dim, False) + _read(mixer, tokens, dim, dim, False)
        move = product(dim, dim, dim).times(1 + mixer.momentum)
        is_last = tokens == rest or not rest
        total += each.times(count) + move.times(count - is_last) + move.without_backward().times(is_last)
    return total
