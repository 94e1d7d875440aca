"""What a rank hands to its collectives in a step, by axis, as `comm/<axis>/bytes_per_step` in the metrics counts it.

An all-reduce and a broadcast count their tensor, a reduce-scatter its whole input, an all-gather the rank's own part, a
send its tensor. docs/parallelism.md derives the formulas. Imports no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection

from hopescale.config.execution import run_again
from hopescale.config.layout import Layout
from hopescale.config.model_shape import mixer_of_block, padded_vocab_size
from hopescale.config.plan import make_plan
from hopescale.config.schema import MixerConfig, RunConfig
from hopescale.config.schema.titans import TitansConfig
from hopescale.config.schema.ttt import TttConfig
from hopescale.cost.carried import handed_on
from hopescale.cost.holdings import Holdings, gathers
from hopescale.cost.parameter import FP32, ParameterShape, itemsize
from hopescale.cost.updates import EVEN_UNIT, NODE_ELEMENTS, assign_owners, buckets

AXES = ("tp", "node", "dp", "cp", "pp", "embedding", "world")
"""Axes as the metrics name them."""
SHARD_UNIT = 2
"""Entries of which a shard of DeepSpeed's is a multiple at `zero` 2."""
LONGEST_CYCLE = 4096
"""Steps over which cadences are averaged at most."""


def due_levels(config: RunConfig, step: int) -> frozenset[str]:
    """Return the levels that a step updates, counted from 1."""
    levels = config.model.cms.levels.items()
    return frozenset(name for name, level in levels if (step + level.phase) % level.update_every_steps == 0)


def stream_bytes(config: RunConfig) -> int:
    """Return the bytes of a micro batch's residual stream, of all ranks that share it."""
    train = config.train
    return train.seq_len * train.micro_batch_size * config.model.d_model * itemsize(train.precision)


class SentBytes:
    """Bytes that the first rank of a pipeline stage sends."""

    def __init__(self, holdings: Holdings, layout: Layout, stage: int):
        self.holdings, self.config, self.layout, self.stage = holdings, holdings.config, layout, stage
        self.parameters, self.slices = holdings.parameters(layout, stage), holdings.slices(layout, stage)
        self.entries, self.owners = holdings.of_stage(layout, stage).entries, holdings.owners(layout, stage)
        self.precision = self.config.train.precision
        self.micro_batches = make_plan(self.config, layout).grad_accumulation
        self.matrices = holdings.matrices(layout, stage)

    def per_step(self) -> dict[str, float]:
        """Return the bytes of a step by axis, averaged over the cadences of the levels."""
        periods = (level.update_every_steps for level in self.config.model.cms.levels.values())
        cycle = min(LONGEST_CYCLE, math.lcm(*periods))
        sets = Counter(due_levels(self.config, step) for step in range(1, cycle + 1))
        total: Counter[str] = Counter()
        for due, count in sets.items():
            for axis, sent in self.of_step(due).items():
                total[axis] += sent * count / cycle
        return {axis: total[axis] for axis in AXES if total[axis]}

    def of_step(self, due: Collection[str], *, measured: Collection[str] = ()) -> dict[str, float]:
        """Return the bytes by axis of a step with due levels.

        Of levels of period 1, the change of those in `measured` is exchanged too, as on steps that are recorded.
        """
        layout, sent = self.layout, dict.fromkeys(AXES, 0.0)
        if layout.tp > 1:
            sent["tp"] = self.micro_batches * (self._tensor() + self._inputs())
        if layout.pp > 1:
            sent |= self._pipeline()
        if layout.cp > 1:
            blocks = [number for each in self.slices for number in each]
            sent["cp"] = self.micro_batches * handed_on(self.config, layout, blocks)
        if layout.replicas > 1:
            sent["dp"] = 8 + self._elementwise(due)
        matrices = [p for p in self.matrices if p.level is None or p.level in due]
        if matrices and layout.replicas > 1:
            sent["dp"] += self._matrices(matrices)
        if layout.node_replicas:
            sent["node"] = self._within_node(due, matrices)
        if matrices and gathers(self.config, layout):
            sent["tp"] += self._matrix_slices(matrices)
        if layout.num_ranks > 1:
            slow = sum(self.config.model.cms.levels[name].update_every_steps > 1 for name in due)
            sent["world"] = 4 * (4 + len(due)) + 8 * (slow + len(set(measured)))
        return sent

    def to_sum_level(self, level: str) -> int:
        """Return the bytes by which the gradients of a due level are summed over replicas at `zero` 0, 1, or nodes."""
        if self.config.parallel.stage:
            own = sum(count for (of, _), count in self._even_shards().items() if of == level)
            elementwise = self._summed_parts * own
        else:
            elementwise = sum(n for kind, n in self.entries.items() if kind.rule == "adamw" and kind.level == level)
        return FP32 * elementwise + self._gradients([p for p in self.matrices if p.level == level])

    def _tensor(self) -> float:
        """Count what tensor-parallel ranks exchange for a micro batch."""
        model, train, segments = self.config.model, self.config.train, self.config.train.segments
        tokens, stream = self._tokens(), stream_bytes(self.config) / self.layout.cp
        blocks = sum(map(len, self.slices))
        first, last = self.slices[0].start == 0, self.slices[-1].stop == model.num_layers
        levels = len(model.cms.levels) if model.cms.placement == "every_block" else 1
        independent = model.cms.variant == "independent"
        sums = 2 if independent else 1 + levels
        forward = (first + blocks * sums) * stream + last * 3 * FP32 * tokens
        total = forward + (last + blocks * sums) * stream
        total += segments * blocks * FP32 * levels * independent
        total += self._within_mixers()
        if train.recompute == "block":
            total += blocks * (sums - 1) * stream
        if self.layout.sequence_parallel:
            part = stream / self.layout.tp
            forward += (last + blocks * sums) * part
            total += (first + last + blocks * (2 * sums + 1)) * part
            total += segments * FP32 * model.d_model * (last + blocks * sums)
            total += {"block": blocks * sums, "memory": blocks}.get(train.recompute, 0) * part
            total -= sum(isinstance(mixer, TitansConfig) for mixer in self._mixers()) * part  # gathered once for all
        # What is behind the last tensor that is kept does not run again: of a stage that hands its stream on, a sum.
        again = forward - (not last) * len(self.slices) * stream
        return total + run_again(self.config) * again

    def _tokens(self) -> int:
        """Count the tokens of a rank's micro batch."""
        return self.config.train.seq_len // self.layout.cp * self.config.train.micro_batch_size

    def _mixers(self) -> list[MixerConfig]:
        """Return the mixer of each block of the stage."""
        return [mixer_of_block(self.config.model, number) for blocks in self.slices for number in blocks]

    def _within_mixers(self) -> int:
        """Count what mixers exchange for a micro batch between their maps in and out.

        Each rank applies a parameter that all hold to its heads alone, so its gradient is summed. TTT's norm over all
        heads sums two numbers per token, and their gradients. Titans sums what its parts hand to one another; of MAL,
        persistent tokens count once for each sequence.
        """
        model, train = self.config.model, self.config.train
        shared = train.segments * sum(p.size for p in self.parameters if ".mixer." in p.name and p.split is None)
        mixers, seq_len = self._mixers(), train.seq_len // self.layout.cp
        passes = (3 if train.recompute in ("block", "memory") else 2) + run_again(self.config)
        sums = 2 * passes * sum(isinstance(mixer, TttConfig) for mixer in mixers)
        titans = [mixer for mixer in mixers if isinstance(mixer, TitansConfig)]
        handed = {"mac": 2 * seq_len, "mag": 0, "mal": seq_len}
        rows = sum(handed[m.composition] + m.persistent_tokens * (m.composition == "mal") for m in titans)
        between = passes * rows * train.micro_batch_size * model.d_model * itemsize(self.precision)
        return FP32 * (shared + sums * self._tokens()) + between

    def _inputs(self) -> float:
        """Count the inputs of layers that tensor-parallel ranks gather for Gram matrices in a micro batch."""
        holdings, entries = self.holdings, 0.0
        for p in self.matrices:
            if holdings.rule_of(p) == "dgd" and holdings.is_cut(p):
                entries += p.shape[-1] * gathers(self.config, self.layout)
            elif holdings.rule_of(p) == "dgd" and ".mixer." in p.name and self.layout.sequence_parallel:
                # The layers of levels, and the head, have all tokens anyway.
                entries += p.shape[-1] / self.layout.tp
        return entries * self._tokens() * itemsize(self.precision)

    def _pipeline(self) -> dict[str, float]:
        """Count the residual stream and its gradient between stages, and what the ends share of a tied embedding."""
        model, layout, ends = self.config.model, self.layout, self.stage in (0, self.layout.pp - 1)
        stream = stream_bytes(self.config) / layout.cp / (layout.tp if layout.sequence_parallel else 1)
        sent = {"pp": (2 * layout.virtual_stages - ends) * self.micro_batches * stream}
        if ends and model.tie_embeddings:
            rows = padded_vocab_size(model) / layout.tp * model.d_model
            sent["embedding"] = rows * (FP32 + (itemsize(self.precision) if layout.replicas > 2 else 0))
        return sent

    def _elementwise(self, due: Collection[str]) -> float:
        """Count gradients and weights of AdamW's parameters between replicas."""
        zero, dp = self.config.parallel.stage, self.layout.replicas
        if zero == 1:
            shards = self._even_shards().items()
            due_shards = [(width, count) for (level, width), count in shards if level is None or level in due]
            return sum((FP32 * self._summed_parts + width) * count for width, count in due_shards)
        chosen = {kind: count for kind, count in self.entries.items() if kind.rule == "adamw"}
        gradients = FP32 * sum(count for kind, count in chosen.items() if kind.level is None or kind.level in due)
        if zero > 1:
            gradients = FP32 * sum(chosen.values()) * self.micro_batches
        if zero < 3:
            return gradients + (self._shards(due) if zero else 0)
        whole = sum(kind.itemsize * count for kind, count in chosen.items())
        # A backward pass still finds the last block whole, and the final norm.
        own = f"blocks.{self.config.model.num_layers - 1}."
        last = sum(
            p.size * p.itemsize(self.precision)
            for p in self.holdings.parameters(self.layout, self.layout.pp - 1)
            if p.name.startswith(own) or p.name == "norm.weight"
        )
        return gradients + self.micro_batches * (2 * whole - last) / dp

    def _within_node(self, due: Collection[str], matrices: list[ParameterShape]) -> float:
        """Count what replicas of a node exchange: all gradients of a step, and weights and `matrices` that are due."""
        dp, nodes, sent = self.layout.replicas, self.layout.nodes, 0.0
        passes = self.micro_batches * self.config.train.segments if self.layout.flushes else 1
        for (level, width), count in self._even_shards().items():
            sent += (FP32 * dp * passes + width * nodes * (level is None or level in due)) * count
        for level in {p.level for p in self.matrices}:
            sent += FP32 * dp * self._even_part(self._summed([p for p in self.matrices if p.level == level]))
        for alike in self._gathered_together(matrices):
            sent += nodes * alike[0].itemsize(self.precision) * self._even_part(sum(p.size for p in alike))
        return sent

    @property
    def _summed_parts(self) -> int:
        """Parts of a flat tensor that a rank contributes to a sum on the axis `dp`: with nodes those of its share."""
        return self.layout.nodes if self.layout.node_replicas else self.layout.replicas

    def _gathered_together(self, matrices: list[ParameterShape]) -> list[list[ParameterShape]]:
        """Return matrices in groups whose weights replicas gather together."""
        together: dict[tuple, list[ParameterShape]] = {}
        for p in matrices:
            together.setdefault((p.level, p.itemsize(self.precision)), []).append(p)
        return list(together.values())

    def _even_shards(self) -> dict[tuple[str | None, int], int]:
        """Count a replica's entries of what `zero=1` updates together, by level and bytes of a weight."""
        together: dict[tuple[str | None, int], list[ParameterShape]] = {}
        for p in self.parameters:
            if self.holdings.rule_of(p) == "adamw":
                together.setdefault((p.level, p.itemsize(self.precision)), []).append(p)
        return {key: sum(map(self._even_part, self._flat_sizes(members))) for key, members in together.items()}

    def _flat_sizes(self, members: list[ParameterShape]) -> list[int]:
        """Return the entries of the flat tensors of what is updated together."""
        sizes = {p.name: p.size for p in members}
        if not self.layout.flushes:
            return [sum(sizes.values())]
        parts = buckets(sizes, dict.fromkeys(sizes, 0), sizes, NODE_ELEMENTS)
        return [sum(sizes[name] for name in part) for part in parts]

    def _shards(self, due: Collection[str]) -> int:
        """Count a replica's shards of due weights: what is updated together is filled up to equal shards."""
        sizes: Counter[tuple] = Counter()
        for p in self.parameters:
            if self.holdings.rule_of(p) == "adamw" and (p.level is None or p.level in due):
                sizes[self.holdings.groups[p.name], p.level, p.itemsize(self.precision)] += p.size
        unit = SHARD_UNIT * self.layout.replicas
        return sum(itemsize * SHARD_UNIT * math.ceil(size / unit) for (_, _, itemsize), size in sizes.items())

    def _matrices(self, matrices: list[ParameterShape]) -> int:
        """Count gradients and weights of matrices between replicas; an owner sends what it has updated."""
        count = 0
        for level in {p.level for p in matrices}:
            together = [p for p in matrices if p.level == level]
            count += self._gradients(together) + self._to_owners(together)
        for alike in self._gathered_together(matrices):
            own = sum(p.size for p in alike if self.owners[p.name] == 0)
            count += alike[0].itemsize(self.precision) * (own + self._even_part(sum(p.size for p in alike)))
        return count

    def _gradients(self, matrices: list[ParameterShape]) -> int:
        """Count gradients and Gram matrices of matrices that replicas sum together, in equal parts."""
        return FP32 * self._summed_parts * self._even_part(self._summed(matrices))

    def _to_owners(self, matrices: list[ParameterShape]) -> int:
        """Count the part of a sum that goes on to the owners."""
        total = self._summed(matrices)
        return FP32 * min(self._even_part(total), total)

    def _summed(self, matrices: list[ParameterShape]) -> int:
        return sum(p.size + self.holdings.gram(p, self.layout.tp) for p in matrices)

    def _even_part(self, entries: int) -> int:
        """Count the entries of a replica's part of a flat tensor, which is filled up to equal parts."""
        return EVEN_UNIT * math.ceil(entries / (EVEN_UNIT * self.layout.replicas))

    def _matrix_slices(self, matrices: list[ParameterShape]) -> float:
        """Count slices of gradients that are sent to make wholes, with columns of Gram matrices, and weights back."""
        holdings, tp = self.holdings, self.layout.tp
        own = [p for p in holdings.matrices(self.layout, self.stage) if self.owners[p.name] == 0 and holdings.is_cut(p)]
        held = assign_owners([holdings.work(p, self.layout) for p in own], tp)
        chosen = [p for p in matrices if p.name in held]
        wholes = sum(tp * p.size * p.itemsize(self.precision) for p in chosen if held[p.name] == 0)
        return FP32 * sum(p.size + holdings.gram(p, tp) for p in chosen) + wholes
