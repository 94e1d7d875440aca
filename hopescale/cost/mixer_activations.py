"""Entries that a chunk of memories keeps for its backward, of one head and one sequence, as the operations make them.

Letters as in `chunk_flops`. Tables of a chunk are `C x C`; what counts tokens and nothing else is left out.
"""

from __future__ import annotations

from hopescale.config.model_shape import head_dim
from hopescale.config.schema import ModelConfig, SelfModifyingConfig
from hopescale.cost.chunk_flops import Bank, banks
from hopescale.ops.limits import is_moved_by_map, is_trace_smaller, trace_size


def part_entries(model: ModelConfig, tokens: int) -> float:
    """Count a projection chunk, states left out: projections, the main memory's chunks, and all writes."""
    mixer, all_banks = model.self_modifying, banks(model)
    source = all_banks[-1]
    total = _retrieval(mixer, source, tokens)
    if len(all_banks) == 1:
        return total + chunk_entries(mixer, source, tokens, reads=True)
    whole, rest = divmod(tokens, mixer.chunk_size)
    for size, count in ((mixer.chunk_size, whole), (rest, 1 if rest else 0)):
        state = all_banks[0].size * (1 + mixer.momentum)
        total += count * (chunk_entries(mixer, all_banks[0], size, reads=True) + state)
    return total + chunk_entries(mixer, source, tokens, reads=False)


def _retrieval(mixer: SelfModifyingConfig, bank: Bank, tokens: int) -> float:
    """Count answers of memories: hidden values twice, the answer, and it at unit length where that is used."""
    used = bank.num_retrieved - (mixer.targets == "self" and "v" in mixer.adaptive)
    hidden = 0 if bank.hidden is None else 2 * tokens * bank.hidden * (bank.num_retrieved + bank.gate_memories)
    return hidden + tokens * bank.dim * (bank.num_retrieved + used) + 5 * tokens


def chunk_entries(mixer: SelfModifyingConfig, bank: Bank, tokens: int, *, reads: bool) -> float:
    """Count a bank's chunk, but for the state after it."""
    erase, square = mixer.inner_rule == "dgd", tokens * tokens
    total = _tables(mixer, tokens) + _writes(mixer, bank, tokens)
    for width, out, count in bank.layers:
        total += count * ((2 + mixer.momentum) * square + tokens * width) * erase
        total += count * _after(mixer, tokens, width, out)
    if not reads:
        return total
    if mixer.read == "boundary":
        return total + (0 if bank.hidden is None else 2 * tokens * bank.hidden)
    for out in [bank.rows] if bank.hidden is None else [bank.hidden, bank.dim]:
        total += (
            _values(mixer, tokens, out) + _initial_reads(mixer, tokens, out) + (2 + (erase and mixer.momentum)) * square
        )
    return total + (0 if bank.hidden is None else 2 * tokens * bank.hidden)


def _tables(mixer: SelfModifyingConfig, tokens: int) -> float:
    """Count the products of gates between tokens: retention, momentum and both, and with the learning rates."""
    row, erase = (tokens + 1) * tokens, mixer.inner_rule == "dgd"
    return (3 + erase) * row + tokens * tokens if mixer.momentum else 2 * row


def _writes(mixer: SelfModifyingConfig, bank: Bank, tokens: int) -> float:
    """Count keys and values of all layers, and what the inner gradient keeps."""
    own, asks = mixer.targets == "self", mixer.objective == "l2" or mixer.targets == "self"
    spread = 1 + mixer.momentum + (mixer.error_cap is not None)
    total = 2 * tokens * bank.dim * own
    # What enters a state is all that is left of values where there is no momentum; a map takes them as they are.
    taken_off = mixer.inner_rule == "dgd" and not mixer.momentum
    first_off = taken_off and not is_moved_by_map(tokens, bank.dim, bank.first, momentum=False)
    if bank.hidden is None:
        return total + tokens * bank.first * (spread - first_off)
    copied = asks and own
    hidden = 3 * (1 + own) + copied + 2
    out = bank.vector_memories * bank.dim + bank.gate_memories
    total += tokens * bank.hidden * (bank.vector_memories + bank.gate_memories) * hidden
    return total + tokens * (out * (spread + 1 - taken_off) + bank.first * (1 - first_off))


def _after(mixer: SelfModifyingConfig, tokens: int, width: int, out: int) -> float:
    """Count what moving a layer's state over the chunk keeps."""
    erase, momentum = mixer.inner_rule == "dgd", mixer.momentum
    pushed = tokens * width * momentum
    if is_moved_by_map(tokens, width, out, momentum=momentum):
        matrices = (1 + momentum) * width * width
        return matrices + tokens * width * ((1 + momentum) * erase + (momentum or not erase)) + pushed
    last = tokens * width * (momentum or not erase)
    return _values(mixer, tokens, out) + last + pushed


def _values(mixer: SelfModifyingConfig, tokens: int, out: int) -> float:
    """Count what keys read of the first state and momentum, and what becomes of it."""
    if mixer.inner_rule != "dgd":
        return 0
    return _initial_reads(mixer, tokens, out) + tokens * out


def _initial_reads(mixer: SelfModifyingConfig, tokens: int, out: int) -> float:
    return tokens * out * (1 + mixer.momentum)


def trace_entries(model: ModelConfig, tokens: int) -> tuple[float, float]:
    """Count what says how a projection chunk moves all layers, and the weights and momenta it says that of.

    A main memory with chunks of its own moves several times: its result is kept instead.
    """
    mixer, (*others, source) = model.self_modifying, banks(model)
    rule = {"momentum": mixer.momentum, "erase": mixer.inner_rule == "dgd"}
    kept, found = sum(bank.size * (1 + mixer.momentum) for bank in others), 0
    for width, out, count in source.layers:
        state = width * out * (1 + mixer.momentum)
        is_smaller = is_trace_smaller(tokens, width, out, **rule)
        kept += count * (trace_size(tokens, width, out, **rule) if is_smaller else state)
        found += count * state * is_smaller
    return kept, found


def whole_entries(model: ModelConfig, seq_len: int) -> tuple[float, float]:
    """Count a sequence whose chunks run at once, and the states between them: as they come, and side by side."""
    mixer, dim = model.self_modifying, head_dim(model)
    size = min(mixer.chunk_size, seq_len)
    chunks = seq_len / size
    erase, momentum = mixer.inner_rule == "dgd", mixer.momentum
    square, wide = size * size, size * dim
    each = _tables(mixer, size) + ((2 + momentum) * square + wide) * erase
    each += (1 + momentum) * dim * dim + wide * ((1 + momentum) * erase + 2 * momentum)
    each += _values(mixer, size, dim) + _initial_reads(mixer, size, dim) + (2 + (erase and momentum)) * square
    return each * chunks, 2 * (1 + momentum) * dim * dim * chunks
