"""Parameters, operations and activations of the self-modifying mixer.

Operations are counted chunk by chunk, as `models.memory` and `ops.delta_rule` run them, for one head and one sequence:
matrix products and triangular solves, and the entries that they leave in float32. The first chunk and one that the
sequence cuts short count like all others. Letters: `C` tokens of a chunk, `D` width of a head, `E` hidden width of a
memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from hopescale.config.model_shape import (
    bank_layers,
    has_chunk_loop,
    head_dim,
    memory_banks,
    memory_dim,
    memory_parts,
    num_pieces,
    projection_chunk_size,
)
from hopescale.config.schema import ModelConfig, SelfModifyingConfig
from hopescale.cost.kernels import kernel_activations, runs_kernels
from hopescale.cost.micro_batch import Activations, MicroBatch
from hopescale.cost.operation import NOTHING, OpCost, product, saved, solve
from hopescale.cost.parameter import FP32, ParameterShape
from hopescale.ops.limits import KERNEL_DIMS, REVERSE_PARTS, is_moved_by_map, is_trace_smaller, trace_size


def self_modifying_parameters(model: ModelConfig, mixer: SelfModifyingConfig) -> Iterator[ParameterShape]:
    """List the parameters of a mixer, by their names in it."""
    heads, dim = model.num_heads, head_dim(model)
    slices = _num_projections(mixer)
    yield ParameterShape("in_proj.weight", (heads * dim * slices, model.d_model), 0, parts=((1, dim),) * slices)
    if mixer.conv_width:
        yield ParameterShape("conv.weight", (heads * dim * 3, mixer.conv_width), 0, keep_fp32=True)
    for gate in ("eta", *["alpha"] * mixer.retention, *["mu"] * mixer.momentum):
        yield ParameterShape(f"gates.{gate}.bias", (heads,), 0, keep_fp32=True)
        if gate not in mixer.adaptive:
            yield ParameterShape(f"gates.{gate}.weight", (heads, dim), 0, keep_fp32=True)
    has_far = mixer.far is not None
    for gate in ("far_eta", *["far_alpha"] * mixer.retention) if has_far else ():
        yield ParameterShape(f"gates.{gate}.bias", (heads,), 0, keep_fp32=True)
        yield ParameterShape(f"gates.{gate}.weight", (heads, dim), 0, keep_fp32=True)
    for bank, names in (memory_banks(mixer) | ({"far": ["mem"]} if has_far else {})).items():
        for name in names:
            for matrix, rows, columns in _memory_matrices(model, mixer, 1 if name in ("eta", "alpha") else dim):
                yield ParameterShape(f"banks.{bank}.{name}.{matrix}", (heads, rows, columns), 0, keep_fp32=True)
    yield ParameterShape("norm.weight", (heads, dim), 0, keep_fp32=True)
    yield ParameterShape("out_proj.weight", (model.d_model, heads * dim), 1)


def _num_projections(mixer: SelfModifyingConfig) -> int:
    """Count the slices of the in-projection: streams for keys, values and queries, and the output gate."""
    return 3 + mixer.gate


def _memory_matrices(model: ModelConfig, mixer: SelfModifyingConfig, out_dim: int) -> list[tuple[str, int, int]]:
    """List the matrices of one memory as (name, rows, columns)."""
    hidden, dim = memory_dim(model, mixer), head_dim(model)
    return [("w", out_dim, dim)] if hidden is None else [("w2", hidden, dim), ("w1", out_dim, hidden)]


def self_modifying_maps(model: ModelConfig, mixer: SelfModifyingConfig) -> OpCost:
    """Count the maps in and out for a token."""
    return product(1, model.d_model, model.num_heads * head_dim(model) * (_num_projections(mixer) + 1))


def self_modifying_mixing(
    model: ModelConfig, mixer: SelfModifyingConfig, seq_len: int, recompute: str | None
) -> OpCost:
    """Count the memories for a token; without `recompute`, the value of `train.recompute`, the model alone."""
    if mixer.far is not None:
        return sum((self_modifying_mixing(model, part, seq_len, recompute) for part in memory_parts(mixer)), NOTHING)
    once = _sequence(model, mixer, seq_len).times(model.num_heads / seq_len)
    if recompute in (None, "none") or not has_chunk_loop(mixer):
        return once
    replay = _replay(model, mixer, seq_len) * model.num_heads / seq_len if recompute == "reverse" else 0
    return OpCost(once.forward, once.backward + once.forward + replay)


def self_modifying_activations(
    model: ModelConfig, mixer: SelfModifyingConfig, micro: MicroBatch, recompute: str
) -> Activations:
    """Count a mixer's activations, without its norm's result; `recompute` is that of the mixer itself."""
    heads, dim = model.num_heads / micro.tp, head_dim(model)
    # Parts run one after the other, forward and backward.
    parts = [_remembered(model, part, micro, recompute) for part in memory_parts(mixer)]
    kept = _streams(mixer, micro, heads, dim) + sum(part.kept for part in parts)
    return Activations(kept, sum(part.states for part in parts), max(part.workspace for part in parts))


def _remembered(model: ModelConfig, mixer: SelfModifyingConfig, micro: MicroBatch, recompute: str) -> Activations:
    """Count memories without the streams that enter them. A chunk of all pieces between resets goes at a time."""
    if runs_kernels(model, mixer, micro, recompute):
        return kernel_activations(model, mixer, micro)
    heads, dim, kept = model.num_heads / micro.tp, head_dim(model), 0.0
    width, per_head = micro.tokens * heads * dim, micro.batch * heads * FP32
    if not has_chunk_loop(mixer):
        # The states between chunks are there twice: as they come, and side by side.
        states = 2 * (1 + mixer.momentum) * dim * dim * max(1, micro.seq_len / mixer.chunk_size)
        return Activations(
            kept + _sequence(model, mixer, micro.seq_len).saved * per_head, states * per_head, 6 * width * FP32
        )
    banks, chunk = _banks(model, mixer), min(projection_chunk_size(mixer), micro.seq_len)
    chunks, entries = -(-micro.seq_len // chunk), sum(bank.size for bank in banks)
    states = chunks * entries * (1 + mixer.momentum) * per_head
    # Of two chunks at a time: what a chunk hands on, and the gradients of what was carried into it.
    at_a_time = num_pieces(mixer, micro.seq_len) * per_head
    handed_on = 2 * entries * (3 + 2 * mixer.momentum) * at_a_time
    if recompute == "none":
        kept += _sequence(model, mixer, micro.seq_len).saved * per_head
        return Activations(kept, states, 4 * width * FP32 + handed_on)
    # Gradients of streams and answers, and one chunk's tensors.
    workspace = 5 * width * FP32 + handed_on + 1.3 * _chunk(model, mixer, chunk).saved * at_a_time
    if recompute != "reverse":
        return Activations(kept, states, workspace)
    trace, restored = (entries * per_head for entries in _trace(model, mixer, chunk))
    rows = -(-chunks // REVERSE_PARTS)
    # States that are computed again: of a row the last, and one for each half, quarter, ... before it.
    workspace += (min(chunks, REVERSE_PARTS) - 1).bit_length() * restored
    return Activations(kept, rows * states / chunks + (chunks - rows) * trace, workspace)


def _streams(mixer: SelfModifyingConfig, micro: MicroBatch, heads: float, dim: int) -> float:
    """Count the inputs and outputs of the memories, in bytes.

    Kernels of streams begin with no convolution's inputs that have gradients.
    """
    numbers, wide = micro.tokens * heads * FP32, micro.tokens * heads * dim * micro.itemsize
    fused = micro.fused and dim in KERNEL_DIMS
    if fused and not (micro.carried and mixer.conv_width):
        # The map in, with the gate, and what enters the map out; streams, logits of gates, and answers in float32.
        return (3 + mixer.gate + 1) * wide + (4 * dim + 1 + mixer.retention + mixer.momentum) * numbers
    # Streams: into the convolution, out of it in float32, and as unit vectors by head.
    conv = (micro.tokens + (mixer.conv_width - 1) * micro.batch) * heads * dim if mixer.conv_width else 0
    kept = 3 * (conv * micro.itemsize + (2 * dim + 1) * numbers)
    kept += (1 + mixer.momentum + mixer.retention - len({"eta", "alpha"} & set(mixer.adaptive))) * numbers
    if fused:
        # The answers in float32, what enters the map out, and the gate, beside which the map in stays.
        return kept + dim * numbers + (1 + (3 + 1) * mixer.gate) * wide
    # The answers and their norm per head in float32, what goes into the out-projection, and the output gate.
    return kept + (2 * dim + 1) * numbers + (1 + 6 * mixer.gate) * wide


@dataclass(frozen=True)
class _Bank:
    """Memories of one head that are written at the same boundaries: some answer with vectors, some with one number.

    Hidden widths are those of MLP memories. The first of the vectors of a main bank is the memory that is read.
    """

    vectors: int
    gates: int
    dim: int
    hidden: int | None
    is_main: bool
    layers: list[tuple[int, int, int]]

    @property
    def rows(self) -> int:
        """Outputs of the first layer of a memory that answers with vectors."""
        return self.hidden or self.dim

    @property
    def outputs(self) -> int:
        """Outputs of all first layers."""
        return self.layers[0][1]

    @property
    def size(self) -> int:
        """Entries of all weights."""
        return sum(width * out * count for width, out, count in self.layers)

    @property
    def inputs(self) -> int:
        """Memories that make keys, values or queries."""
        return self.vectors - self.is_main


def _banks(model: ModelConfig, mixer: SelfModifyingConfig) -> list[_Bank]:
    """Return the banks of a head, the one with the main memory first."""
    result, widths = [], (head_dim(model), memory_dim(model, mixer))
    for names in memory_banks(mixer).values():
        gates = sum(name in ("eta", "alpha") for name in names)
        result.append(_Bank(len(names) - gates, gates, *widths, names[0] == "mem", bank_layers(model, mixer, names)))
    return result


def _sequence(model: ModelConfig, mixer: SelfModifyingConfig, seq_len: int) -> OpCost:
    """Count the memories of a head over a sequence, piece by piece between resets."""
    whole, rest = divmod(seq_len, mixer.reset_every or seq_len)
    cost = _piece(model, mixer, mixer.reset_every or seq_len).times(whole) if whole else NOTHING
    return cost + _piece(model, mixer, rest) if rest else cost


def _piece(model: ModelConfig, mixer: SelfModifyingConfig, seq_len: int) -> OpCost:
    """Count the memories of a head from their first state to the last one, which nobody reads."""
    dim = head_dim(model)
    if has_chunk_loop(mixer):
        chunk = min(projection_chunk_size(mixer), seq_len)
        # Nobody reads the states after the last chunk, which get no gradient.
        (main, *others), size = _banks(model, mixer), min(mixer.chunk_size, chunk)
        last = sum((_states(mixer, bank, chunk) for bank in others), _states(mixer, main, size if others else chunk))
        return _chunk(model, mixer, chunk).times(seq_len / chunk) + OpCost(0, -last.backward)
    chunk = min(mixer.chunk_size, seq_len)
    each = _tables(mixer, chunk) + _open(mixer, chunk, dim) + _transition(mixer, chunk, dim)
    each += _added(mixer, chunk, dim, dim, by_map=True)
    each += _values(mixer, chunk, dim, dim) + _read(mixer, chunk, dim, dim)
    return each.times(seq_len / chunk)


def _chunk(model: ModelConfig, mixer: SelfModifyingConfig, tokens: int) -> OpCost:
    """Count a projection chunk: the projections that memories make, the main memory's chunks, and all writes.

    States at the start of a projection chunk are left out; those at the start of the main memory's chunks in it count.
    """
    main, *others = _banks(model, mixer)
    source = others[0] if others else main
    cost = _inputs(mixer, source, tokens)
    if not others:
        return cost + _move(mixer, main, tokens, reads=True)
    size = min(mixer.chunk_size, tokens)
    each = _move(mixer, main, size, reads=True) + saved(main.size * (1 + mixer.momentum))
    return cost + each.times(tokens / size) + _move(mixer, source, tokens, reads=False)


def _inputs(mixer: SelfModifyingConfig, bank: _Bank, tokens: int) -> OpCost:
    """Count keys, values, queries and gates that memories answer: hidden values twice, answers, and unit vectors."""
    unit_vectors = bank.inputs - (mixer.targets == "self" and "v" in mixer.adaptive)
    cost = _answer(bank, tokens, bank.inputs) + saved(tokens * bank.dim * (bank.inputs + unit_vectors) + 5 * tokens)
    gates = product(tokens, bank.dim, bank.gates * (bank.hidden or 1))
    return cost + gates + saved(2 * tokens * (bank.hidden or 0) * bank.gates)


def _answer(bank: _Bank, tokens: int, memories: int) -> OpCost:
    """Count the answers of memories with fixed weights, hidden values kept twice."""
    cost = product(tokens, bank.dim, bank.rows)
    if bank.hidden is not None:
        cost += product(tokens, bank.hidden, bank.dim) + saved(2 * tokens * bank.hidden)
    return cost.times(memories)


def _move(mixer: SelfModifyingConfig, bank: _Bank, tokens: int, *, reads: bool) -> OpCost:
    """Count a bank's chunk: decay weights, writes, its layers moved, and the main memory read if there are queries."""
    cost = _tables(mixer, tokens) + _writes(mixer, bank, tokens) + _states(mixer, bank, tokens)
    for width, _, count in bank.layers:
        cost += _open(mixer, tokens, width).times(count)
    if not reads:
        return cost
    if mixer.read == "boundary":
        return cost + _answer(bank, tokens, 1)._replace(saved=2 * tokens * (bank.hidden or 0))
    for width, out in [(bank.dim, bank.rows), (bank.hidden, bank.dim)][: 1 if bank.hidden is None else 2]:
        cost += _values(mixer, tokens, width, out) + _read(mixer, tokens, width, out)
    return cost + saved(2 * tokens * (bank.hidden or 0))


def _tables(mixer: SelfModifyingConfig, tokens: int) -> OpCost:
    """Count the products of gates between tokens: retention, momentum and both, and with the learning rates."""
    row = (tokens + 1) * tokens
    if not mixer.momentum:
        return saved(2 * row)
    erase = mixer.inner_rule == "dgd"
    return product(tokens + 1, tokens, tokens + 1) + saved((3 + erase) * row + tokens * tokens)


def _writes(mixer: SelfModifyingConfig, bank: _Bank, tokens: int) -> OpCost:
    """Count keys, values, and the inner gradient: first layers at keys and targets, and the way back through second."""
    own = mixer.targets == "self"
    cost = product((1 + own) * tokens, bank.dim, bank.outputs) + saved(2 * tokens * bank.dim * own)
    spread = 1 + _averages(mixer) + (mixer.error_cap is not None)
    # What enters a state is all that is left of values where there is no momentum; a map takes them as they are.
    erased = mixer.inner_rule == "dgd" and not mixer.momentum
    first_erased = erased and not is_moved_by_map(tokens, bank.dim, bank.outputs, momentum=False)
    if bank.hidden is None:
        return cost + saved(tokens * bank.outputs * (spread - first_erased))
    asks = mixer.objective == "l2" or own
    out = bank.vectors * bank.dim + bank.gates
    cost += product(tokens, bank.hidden, out).times(1 + asks)
    hidden = tokens * bank.hidden * (bank.vectors + bank.gates) * (3 * (1 + own) + (asks and own) + 2)
    return cost + saved(hidden + tokens * (out * (spread + 1 - erased) + bank.outputs * (1 - first_erased)))


def _averages(mixer: SelfModifyingConfig) -> bool:
    """Whether writes are scaled before they enter the momentum."""
    return mixer.momentum and mixer.momentum_write == "averaged"


def _open(mixer: SelfModifyingConfig, tokens: int, width: int) -> OpCost:
    """Count the keys' similarities and the solve for their erases."""
    if mixer.inner_rule != "dgd":
        return NOTHING
    kept = (2 + mixer.momentum) * tokens * tokens + tokens * width
    return product(tokens, width, tokens) + solve(tokens, width) + saved(kept)


def _states(mixer: SelfModifyingConfig, bank: _Bank, tokens: int) -> OpCost:
    """Count the states of all layers after a chunk."""
    return sum((_after(mixer, tokens, width, out).times(count) for width, out, count in bank.layers), NOTHING)


def _after(mixer: SelfModifyingConfig, tokens: int, width: int, out: int) -> OpCost:
    """Count a layer's state after a chunk, `width` inputs to `out` outputs."""
    if is_moved_by_map(tokens, width, out, momentum=mixer.momentum):
        return _transition(mixer, tokens, width) + _added(mixer, tokens, width, out, by_map=True)
    last = tokens * width * (mixer.momentum or mixer.inner_rule != "dgd")
    return _values(mixer, tokens, width, out) + _added(mixer, tokens, width, out, by_map=False) + saved(last)


def _added(mixer: SelfModifyingConfig, tokens: int, width: int, out: int, *, by_map: bool) -> OpCost:
    """Count the addition of a chunk's writes to a layer, after its state was multiplied by a matrix or erased."""
    momentum, entering = mixer.momentum, product(width, tokens, out)
    if by_map:
        cost = (entering + product(width, width, out)).times(1 + momentum)
    else:
        cost = entering.times(1 + momentum + (momentum and mixer.inner_rule == "dgd"))
    return cost + saved(tokens * width * momentum)


def _transition(mixer: SelfModifyingConfig, tokens: int, width: int) -> OpCost:
    """Count the matrix `width x width` by which a chunk moves a layer."""
    momentum, erase = mixer.momentum, mixer.inner_rule == "dgd"
    kept = (1 + momentum) * width * width + tokens * width * ((1 + momentum) * erase + (momentum or not erase))
    if not erase:
        return saved(kept)
    cost = product(width, tokens, width).times(1 + momentum) + product(width, tokens, tokens).times(momentum)
    return cost + saved(kept)


def _values(mixer: SelfModifyingConfig, tokens: int, width: int, out: int) -> OpCost:
    """Count the reads of keys, from the state at the chunk's start and from the writes since."""
    if mixer.inner_rule != "dgd":
        return NOTHING
    cost = _from_start(mixer, tokens, width, out) + saved(tokens * out)
    return cost + product(tokens, tokens, out).times(mixer.momentum)


def _from_start(mixer: SelfModifyingConfig, tokens: int, width: int, out: int) -> OpCost:
    """Count the reads of keys or queries from the state and the momentum at the chunk's start."""
    return (product(tokens, width, out) + saved(tokens * out)).times(1 + mixer.momentum)


def _read(mixer: SelfModifyingConfig, tokens: int, width: int, out: int) -> OpCost:
    """Count a read inside a chunk: of the state at its start, of writes and of erases since."""
    erase, both = mixer.inner_rule == "dgd", mixer.inner_rule == "dgd" and mixer.momentum
    cost = product(tokens, width, tokens) + _from_start(mixer, tokens, width, out)
    cost += solve(tokens, tokens).times(erase) + product(tokens, tokens, out).times(1 + both)
    return cost + saved((2 + both) * tokens * tokens)


def _layers(model: ModelConfig, mixer: SelfModifyingConfig, tokens: int) -> list[tuple[int, int, int, bool]]:
    """Return width, outputs, number and `is_trace_smaller` of the layers that are written at projection chunks."""
    rule = {"momentum": mixer.momentum, "erase": mixer.inner_rule == "dgd"}
    return [(*layer, is_trace_smaller(tokens, *layer[:2], **rule)) for layer in _banks(model, mixer)[-1].layers]


def _replay(model: ModelConfig, mixer: SelfModifyingConfig, seq_len: int) -> float:
    """Count the work that `train.recompute: reverse` adds: states computed again, half a row at a time."""
    tokens = projection_chunk_size(mixer)
    chunks, in_a_row, once = seq_len / tokens, min(seq_len, mixer.reset_every or seq_len) / tokens, 0.0
    for width, out, count, is_smaller in _layers(model, mixer, tokens):
        by_map = is_moved_by_map(tokens, width, out, momentum=mixer.momentum)
        once += count * is_smaller * _added(mixer, tokens, width, out, by_map=by_map).forward
    return once * chunks / 2 * math.log2(max(1, min(REVERSE_PARTS, in_a_row)))


def _trace(model: ModelConfig, mixer: SelfModifyingConfig, tokens: int) -> tuple[float, float]:
    """Count the traces of a projection chunk, for all layers, and the weights and momenta that they move.

    A main memory with chunks of its own moves several times: its result is kept instead.
    """
    rates = 1 + mixer.momentum
    rule = {"momentum": mixer.momentum, "erase": mixer.inner_rule == "dgd"}
    kept, restored = sum(bank.size * rates for bank in _banks(model, mixer)[:-1]), 0
    for width, out, count, is_smaller in _layers(model, mixer, tokens):
        state = width * out * rates
        kept += count * (trace_size(tokens, width, out, **rule) if is_smaller else state)
        restored += count * state * is_smaller
    return kept, restored
