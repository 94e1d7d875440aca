"""What a rank hands to its collectives in a step, by axis, as `comm/<axis>/bytes_per_step` in the metrics counts it.

An all-reduce and a broadcast count their tensor, a reduce-scatter its whole input, an all-gather the rank's own part, a
send its tensor. docs/parallelism.md derives the formulas. Imports no torch.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping

from hopescale.config.layout import Layout
from hopescale.config.model_shape import head_dim, padded_vocab_size
from hopescale.config.plan import make_plan
from hopescale.config.schema import RunConfig
from hopescale.cost.holdings import Holdings, gathers
from hopescale.cost.params import FP32, ParameterShape, itemsize
from hopescale.cost.updates import BUCKET_ELEMENTS, assign_owners, buckets

AXES = ("tp", "dp", "pp", "embedding", "world")
"""Axes as the metrics name them."""
SHARD_UNIT = 2
"""Entries of which a shard of DeepSpeed's is a multiple at `zero` 1 and 2."""
LONGEST_CYCLE = 4096
"""Steps over which cadences are averaged at most."""


def bytes_per_step(holdings: Holdings, config: RunConfig, layout: Layout, stage: int) -> dict[str, float]:
    """Return the bytes of a step by axis on the first rank of a stage, averaged over the cadences of the levels."""
    levels = config.model.cms.levels
    cycle = min(LONGEST_CYCLE, math.lcm(*(level.update_every_steps for level in levels.values())))
    sets = Counter(due_levels(config, step) for step in range(1, cycle + 1))
    total: Counter[str] = Counter()
    for due, count in sets.items():
        for axis, sent in bytes_of_step(holdings, config, layout, stage, due).items():
            total[axis] += sent * count / cycle
    return {axis: total[axis] for axis in AXES if total[axis]}


def due_levels(config: RunConfig, step: int) -> frozenset[str]:
    """Return the levels that a step updates, counted from 1."""
    levels = config.model.cms.levels.items()
    return frozenset(name for name, level in levels if (step + level.phase) % level.update_every_steps == 0)


def bytes_of_step(
    holdings: Holdings,
    config: RunConfig,
    layout: Layout,
    stage: int,
    due: Collection[str],
    *,
    measured: Collection[str] = (),
) -> dict[str, float]:
    """Return the bytes of a step by axis on the first rank of a stage.

    Args:
        holdings: Holdings of the config's model and optimizer.
        config: Config that has passed its checks.
        layout: Degrees of the axes.
        stage: Pipeline rank.
        due: Levels that the step updates.
        measured: Levels of period 1 whose change is measured, as on steps that are recorded.
    """
    sent = dict.fromkeys(AXES, 0.0)
    micro_batches = make_plan(config, layout).grad_accumulation
    if layout.tp > 1:
        inputs = _inputs(holdings, config, layout, stage)
        sent["tp"] = micro_batches * (_tensor(config, layout, holdings.slices(layout, stage)) + inputs)
    if layout.pp > 1:
        sent |= _pipeline(config, layout, stage, micro_batches)
    if layout.dp > 1:
        sent["dp"] = 8 + _elementwise(holdings, config, layout, stage, due, micro_batches)
    matrices = _matrices(holdings, config, layout, stage, due)
    sent = {axis: count + matrices.get(axis, 0) for axis, count in sent.items()}
    if layout.num_ranks > 1:
        slow = sum(config.model.cms.levels[name].update_every_steps > 1 for name in due)
        sent["world"] = 4 * (3 + len(due)) + 8 * (slow + len(set(measured)))
    return sent


def bytes_to_sum_level(holdings: Holdings, config: RunConfig, layout: Layout, stage: int, level: str) -> int:
    """Return the bytes by which a rank of a stage sums the gradients of a due level over replicas at `zero` 0, 1."""
    entries = holdings.of_stage(layout, stage).entries
    elementwise = sum(count for kind, count in entries.items() if kind.rule == "adamw" and kind.level == level)
    matrices = [p for p in _ordered_matrices(holdings, config, layout, stage) if p.level == level]
    return FP32 * elementwise + _gradients_of_matrices(holdings, layout, stage, matrices)


def stream_bytes(config: RunConfig) -> int:
    """Return the bytes of a micro batch's residual stream."""
    train = config.train
    return train.seq_len * train.micro_batch_size * config.model.d_model * itemsize(train.precision)


def _tensor(config: RunConfig, layout: Layout, slices: list[range]) -> float:
    """Count what tensor-parallel ranks exchange for a micro batch."""
    model, train, stream = config.model, config.train, stream_bytes(config)
    blocks = sum(map(len, slices))
    first, last = slices[0].start == 0, slices[-1].stop == model.num_layers
    levels = len(model.cms.levels) if model.cms.placement == "every_block" else 1
    independent = model.cms.variant == "independent"
    sums = 2 if independent else 1 + levels
    total = (first + last + 2 * blocks * sums) * stream + last * 3 * FP32 * train.seq_len * train.micro_batch_size
    total += blocks * FP32 * levels * independent
    if model.mixer == "attention" and model.attention.qk_norm:
        total += blocks * 2 * FP32 * head_dim(model)
    if train.recompute == "block":
        total += blocks * (sums - 1) * stream
    if layout.sequence_parallel:
        part = stream / layout.tp
        total += (first + last + blocks * (2 * sums + 1)) * part + FP32 * model.d_model * (last + blocks * sums)
        total += {"block": blocks * sums, "memory": blocks}.get(train.recompute, 0) * part
    return total


def _pipeline(config: RunConfig, layout: Layout, stage: int, micro_batches: int) -> dict[str, float]:
    """Count the residual stream and its gradient between stages, and what the ends share of a tied embedding."""
    model, ends = config.model, stage in (0, layout.pp - 1)
    stream = stream_bytes(config) / (layout.tp if layout.sequence_parallel else 1)
    sent = {"pp": (2 * layout.virtual_stages - ends) * micro_batches * stream}
    if ends and model.tie_embeddings:
        rows = padded_vocab_size(model) / layout.tp * model.d_model
        sent["embedding"] = rows * (FP32 + (itemsize(config.train.precision) if layout.dp > 2 else 0))
    return sent


def _elementwise(
    holdings: Holdings, config: RunConfig, layout: Layout, stage: int, due: Collection[str], micro_batches: int
) -> float:
    """Count gradients and weights of AdamW's parameters between replicas."""
    zero, dp = config.parallel.zero, layout.dp
    entries = holdings.of_stage(layout, stage).entries
    chosen = {kind: count for kind, count in entries.items() if kind.rule == "adamw"}
    all_due = {kind: count for kind, count in chosen.items() if kind.level is None or kind.level in due}
    gradients = FP32 * sum(all_due.values())
    if zero == 0:
        return gradients
    if zero == 1:
        return gradients + _bytes_of_shards(holdings, layout, stage, due)
    gradients = FP32 * sum(chosen.values()) * micro_batches
    if zero == 2:
        return gradients + _bytes_of_shards(holdings, layout, stage, due)
    whole = sum(kind.itemsize * count for kind, count in chosen.items())
    last = _bytes_of_last_block(holdings, config, layout)
    return gradients + micro_batches * (2 * whole - last) / dp


def _bytes_of_shards(holdings: Holdings, layout: Layout, stage: int, due: Collection[str]) -> int:
    """Return the bytes of a replica's shards of due weights: what is updated together is filled up to equal shards."""
    sizes: Counter[tuple] = Counter()
    for p in holdings.parameters(layout, stage):
        if holdings.rule_of(p) == "adamw" and (p.level is None or p.level in due):
            sizes[holdings.groups[p.name], p.level, p.itemsize(holdings.config.train.precision)] += p.size
    unit = SHARD_UNIT * layout.dp
    return sum(itemsize * SHARD_UNIT * math.ceil(size / unit) for (_, _, itemsize), size in sizes.items())


def _bytes_of_last_block(holdings: Holdings, config: RunConfig, layout: Layout) -> float:
    """Return the bytes of the weights that a backward pass still finds whole: the last block, and the final norm."""
    own = f"blocks.{config.model.num_layers - 1}."
    return sum(
        p.size * p.itemsize(config.train.precision)
        for p in holdings.parameters(layout, layout.pp - 1)
        if p.name.startswith(own) or p.name == "norm.weight"
    )


def _matrices(
    holdings: Holdings, config: RunConfig, layout: Layout, stage: int, due: Collection[str]
) -> Mapping[str, float]:
    """Count gradients and weights of matrices between replicas, and their slices between tensor-parallel ranks."""
    parameters = holdings.matrices(layout, stage)
    if not parameters or layout.dp == layout.tp == 1:
        return {}
    owners, precision = holdings.owners(layout, stage), config.train.precision
    parameters = [p for p in _ordered_matrices(holdings, config, layout, stage) if p.level is None or p.level in due]
    sent: Counter[str] = Counter()
    if layout.dp > 1:
        for level in {p.level for p in parameters}:
            of_level = [p for p in parameters if p.level == level]
            sent["dp"] += _gradients_of_matrices(holdings, layout, stage, of_level)
        for width in {p.itemsize(precision) for p in parameters}:
            sizes = {p.name: p.size for p in parameters if p.itemsize(precision) == width}
            sent["dp"] += width * sum(_rooms(sizes, owners, layout.dp))
    if gathers(config, layout):
        sent["tp"] += _slices(holdings, config, layout, stage, parameters)
    return sent


def _gradients_of_matrices(holdings: Holdings, layout: Layout, stage: int, matrices: list[ParameterShape]) -> int:
    """Count gradients and Gram matrices of matrices that replicas sum together."""
    sizes = {p.name: p.size + holdings.gram(p, layout.tp) for p in matrices}
    return FP32 * layout.dp * sum(_rooms(sizes, holdings.owners(layout, stage), layout.dp))


def _ordered_matrices(holdings: Holdings, config: RunConfig, layout: Layout, stage: int) -> list[ParameterShape]:
    """Return the matrices of a stage in the optimizer's order: equal shapes side by side, by owner."""
    matrices = holdings.matrices(layout, stage)
    owners = holdings.owners(layout, stage)
    classes: dict[tuple, int] = {}
    order = {}
    for index, p in enumerate(matrices):
        key = (holdings.groups[p.name], holdings.cadence(p), p.itemsize(config.train.precision), p.shape, p.split)
        order[p.name] = (classes.setdefault(key, len(classes)), owners[p.name], index)
    return sorted(matrices, key=lambda p: order[p.name])


def _rooms(sizes: Mapping[str, int], owners: Mapping[str, int], dp: int) -> list[int]:
    """Return the entries of an owner's part of each exchange: as many as the owner with most needs."""
    rooms = []
    for bucket in buckets(sizes, owners, sizes, BUCKET_ELEMENTS // dp):
        parts: dict[int, int] = defaultdict(int)
        for name in bucket:
            parts[owners[name]] += sizes[name]
        rooms.append(max(parts.values()))
    return rooms


def _slices(
    holdings: Holdings, config: RunConfig, layout: Layout, stage: int, parameters: list[ParameterShape]
) -> float:
    """Count slices of gradients that are sent to make wholes, with columns of Gram matrices, and weights sent back."""
    owners = holdings.owners(layout, stage)
    own = [p for p in holdings.matrices(layout, stage) if owners[p.name] == 0 and holdings.is_cut(p)]
    held = assign_owners([holdings.work(p, layout) for p in own], layout.tp)
    chosen = [p for p in parameters if p.name in held]
    wholes = sum(layout.tp * p.size * p.itemsize(config.train.precision) for p in chosen if held[p.name] == 0)
    return FP32 * sum(p.size + holdings.gram(p, layout.tp) for p in chosen) + wholes


def _inputs(holdings: Holdings, config: RunConfig, layout: Layout, stage: int) -> float:
    """Count the inputs of layers that tensor-parallel ranks gather for Gram matrices in a micro batch."""
    train = config.train
    entries = 0.0
    for p in holdings.parameters(layout, stage):
        if holdings.rule_of(p) != "dgd":
            continue
        if holdings.is_cut(p):
            entries += p.shape[-1] * gathers(config, layout)
        elif ".mixer." in p.name and layout.sequence_parallel:
            # The layers of levels, and the head, have all tokens anyway.
            entries += p.shape[-1] / layout.tp
    return entries * train.seq_len * train.micro_batch_size * itemsize(train.precision)
