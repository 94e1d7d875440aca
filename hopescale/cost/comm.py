"""Bytes that a rank hands to its collectives in a step, by axis, as `comm/<axis>/bytes_per_step` in the metrics.

An all-reduce and a broadcast count their tensor, a reduce-scatter its whole input, an all-gather the rank's own part, a
send its tensor. docs/parallelism.md derives the formulas. Imports no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection

from hopescale.config.execution import run_again
from hopescale.config.layout import Layout
from hopescale.config.model_shape import mixer_of_block, padded_vocab_size, phases
from hopescale.config.plan import make_plan
from hopescale.config.schema import LevelConfig, MixerConfig, RunConfig
from hopescale.config.schema.titans import TitansConfig
from hopescale.config.schema.ttt import TttConfig
from hopescale.cost.carried import handed_on
from hopescale.cost.holdings import Holdings, gathers
from hopescale.cost.parameter import FP32, LevelPart, ParameterShape, itemsize
from hopescale.cost.updates import (
    BUCKET_ELEMENTS,
    EVEN_UNIT,
    NODE_ELEMENTS,
    buckets,
    even_sets,
    matrix_sets,
    wire_bytes,
)

AXES = ("tp", "node", "dp", "cp", "pp", "embedding", "world")
"""Axes as the metrics name them."""
SHARD_UNIT = 2
"""Entries of which a shard of DeepSpeed's is a multiple at `zero` 2."""
LONGEST_CYCLE = 4096
"""Steps over which cadences are averaged at most."""


def due_parts(config: RunConfig, step: int) -> frozenset[LevelPart]:
    """Return the parts of levels that a step, counted from 1, updates."""
    levels = config.model.cms.levels
    late = {name: level.lag for name, level in levels.items()}
    return frozenset((name, phase) for name, phase in _parts(config) if _ends(levels[name], phase, step - late[name]))


def sent_parts(config: RunConfig, step: int) -> frozenset[LevelPart]:
    """Return the parts of levels whose sums a step sends: those that are due, or will be after the lag."""
    levels = config.model.cms.levels
    return frozenset((name, phase) for name, phase in _parts(config) if _ends(levels[name], phase, step))


def _parts(config: RunConfig) -> set[LevelPart]:
    model = config.model
    return {
        (name, phase)
        for name, level in model.cms.levels.items()
        for phase in (phases(model, name).values() if level.rolling else (level.phase,))
    }


def _ends(level: LevelConfig, phase: int, step: int) -> bool:
    return step > 0 and (step + phase) % level.update_every_steps == 0


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
        self._set_of = self._matrix_sets()

    def _matrix_sets(self) -> dict[str, int]:
        """Return the number of the set in which each matrix lies: its flat tensor, or several for types and blocks."""
        together: dict[tuple, dict[str, int]] = {}
        for p in self.matrices:
            together.setdefault((p.due, self.holdings.rule_of(p) == "dgd"), {})[p.name] = p.size
        whole, sets = sum(p.size for p in self.matrices), []
        for (_, has_grams), sizes in together.items():
            is_cut = self.layout.replicas > 1 and not self.layout.node_replicas and not has_grams
            sets += matrix_sets(sizes, whole) if is_cut else [[*sizes]]
        return {name: number for number, names in enumerate(sets) for name in names}

    def per_step(self) -> dict[str, float]:
        """Return the bytes of a step by axis, averaged over the cadences of the levels."""
        periods = (level.update_every_steps for level in self.config.model.cms.levels.values())
        cycle = min(LONGEST_CYCLE, math.lcm(*periods))
        # With a lag the first cycle has fewer updates.
        first = 1 + cycle * any(level.lag for level in self.config.model.cms.levels.values())
        steps = range(first, first + cycle)
        sets = Counter((due_parts(self.config, step), sent_parts(self.config, step)) for step in steps)
        total: Counter[str] = Counter()
        for (due, gone), count in sets.items():
            for axis, sent in self.of_step(due, gone).items():
                total[axis] += sent * count / cycle
        return {axis: total[axis] for axis in AXES if total[axis]}

    def of_step(
        self, due: Collection[LevelPart], gone: Collection[LevelPart], *, measured: Collection[str] = ()
    ) -> dict[str, float]:
        """Return the bytes by axis of a step at which parts of levels are due, and the sums of some are sent.

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
            sent["dp"] = 8 + self._elementwise(due, gone)
        matrices = [p for p in self.matrices if p.due is None or p.due in due]
        if layout.replicas > 1:
            sent["dp"] += self._matrices(matrices)
            sent["dp"] += self._gradients([p for p in self.matrices if p.due is None or p.due in gone])
        if layout.node_replicas:
            sent["node"] = self._within_node(due, matrices)
        if matrices and gathers(self.config, layout):
            sent["tp"] += self._matrix_slices(matrices)
        if layout.num_ranks > 1:
            levels = {level for level, _ in due}
            slow = sum(self.config.model.cms.levels[name].update_every_steps > 1 for name in levels)
            sent["world"] = 4 * (4 + len(levels)) + 8 * (slow + len(set(measured)))
        return sent

    def to_sum_level(self, level: str, due: Collection[LevelPart]) -> int:
        """Return the bytes of summing the due gradients of a level over replicas at `zero` 0, 1."""
        total = 0
        for part in {part for part in due if part[0] == level}:
            if self.config.parallel.stage:
                sets = [counts for (of, _), counts in self._even_shards().items() if of == part]
                total += sum(self._rows(part, count) for counts in sets for count in counts)
            else:
                total += self._whole(part)[0]
            total += self._gradients([p for p in self.matrices if p.due == part])
        return total

    def _rows(self, part: LevelPart | None, entries: int) -> int:
        """Return the bytes of the rows of a sum that a rank sends on the axis `dp`, of so many entries each."""
        wire = "fp32" if part is None else self.config.model.cms.levels[part[0]].wire
        return self._summed_parts * wire_bytes(entries, wire)

    def _whole(self, part: LevelPart | None) -> tuple[int, int]:
        """Return the bytes of AdamW's sums at `zero=0` that replicas send, and of the totals that come back apart."""
        entries = {kind: n for kind, n in self.entries.items() if kind.rule == "adamw" and kind.due == part}
        if part is None or self.config.model.cms.levels[part[0]].wire == "fp32":
            return FP32 * sum(entries.values()), 0
        names = {p.name: p.size for p in self.parameters if p.due == part and self.holdings.rule_of(p) == "adamw"}
        packed = buckets(names, dict.fromkeys(names, 0), names, BUCKET_ELEMENTS)
        rows = [self._even_part(sum(names[name] for name in bucket)) for bucket in packed]
        return sum(self._rows(part, count) for count in rows), FP32 * sum(rows)

    def _tensor(self) -> float:
        """Count the bytes that tensor-parallel ranks exchange for a micro batch."""
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
        """Count the bytes that mixers exchange for a micro batch between their projections.

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
        """Count the residual stream and its gradient between stages, and a tied embedding between the outer two."""
        model, layout, ends = self.config.model, self.layout, self.stage in (0, self.layout.pp - 1)
        stream = stream_bytes(self.config) / layout.cp / (layout.tp if layout.sequence_parallel else 1)
        sent = {"pp": (2 * layout.virtual_stages - ends) * self.micro_batches * stream}
        if ends and model.tie_embeddings:
            rows = padded_vocab_size(model) / layout.tp * model.d_model
            sent["embedding"] = rows * (FP32 + (itemsize(self.precision) if layout.replicas > 2 else 0))
        return sent

    def _elementwise(self, due: Collection[LevelPart], gone: Collection[LevelPart]) -> float:
        """Count gradients and weights of AdamW's parameters between replicas."""
        zero, dp = self.config.parallel.stage, self.layout.replicas
        if zero == 1:
            shards = self._even_shards().items()
            weights = sum(width * sum(counts) for (part, width), counts in shards if part is None or part in due)
            leaving = [(part, n) for (part, _), counts in shards if part is None or part in gone for n in counts]
            return weights + sum(self._rows(part, n) for part, n in leaving)
        chosen = {kind: count for kind, count in self.entries.items() if kind.rule == "adamw"}
        if zero == 0:
            return sum(self._whole(part)[0] for part in {None, *gone}) + sum(self._whole(part)[1] for part in due)
        gradients = FP32 * sum(chosen.values()) * self.micro_batches
        if zero < 3:
            return gradients + self._shards(due)
        whole = sum(kind.itemsize * count for kind, count in chosen.items())
        # A backward pass still finds the last block whole, and the final norm.
        own = f"blocks.{self.config.model.num_layers - 1}."
        last = sum(
            p.size * p.itemsize(self.precision)
            for p in self.holdings.parameters(self.layout, self.layout.pp - 1)
            if p.name.startswith(own) or p.name == "norm.weight"
        )
        return gradients + self.micro_batches * (2 * whole - last) / dp

    def _within_node(self, due: Collection[LevelPart], matrices: list[ParameterShape]) -> float:
        """Count the exchanges of a node's replicas: all gradients of a step, and weights and `matrices` that are due.

        Weights that are shared out count whenever they are gathered, due or not.
        """
        dp, nodes, sent = self.layout.replicas, self.layout.nodes, 0.0
        passes = self.micro_batches if self.layout.flushes else 1
        sent += FP32 * dp * passes * sum(map(sum, self._even_shards().values()))
        for (part, width), counts in self._even_shards(self._always_whole(self.parameters)).items():
            sent += width * nodes * (part is None or part in due) * sum(counts)
        for members in self._in_sets(self.matrices):
            sent += FP32 * dp * self._even_part(self._summed(members))
        for alike in self._gathered_together(self._always_whole(matrices)):
            sent += nodes * alike[0].itemsize(self.precision) * self._even_part(sum(p.size for p in alike))
        return sent + nodes * self._gathered_around_passes()

    def _gathered_around_passes(self) -> int:
        """Count a replica's parts of the weights that are gathered around forward and backward passes, in a step.

        The last block's weights stay from one to the other.
        """
        if not self.config.parallel.shares_weights:
            return 0
        last, total = self.config.model.num_layers - 1, 0
        for number in range(last + 1):
            inside = [p for p in self.parameters if p.block == number]
            parts = sum(width * sum(counts) for (_, width), counts in self._even_shards(inside).items())
            for alike in self._gathered_together([p for p in inside if self.holdings.rule_of(p) != "adamw"]):
                parts += alike[0].itemsize(self.precision) * self._even_part(sum(p.size for p in alike))
            total += parts * (1 if number == last else 2)
        return total * self.micro_batches

    def _block_of(self, parameter: ParameterShape) -> int | None:
        """Return the number of the block whose weights a parameter is gathered with; None where it is whole always."""
        return parameter.block if self.config.parallel.shares_weights else None

    def _always_whole(self, parameters: list[ParameterShape]) -> list[ParameterShape]:
        return [p for p in parameters if self._block_of(p) is None]

    @property
    def _summed_parts(self) -> int:
        """Parts of a flat tensor that a rank contributes to a sum on the axis `dp`: with nodes those of its share."""
        return self.layout.nodes if self.layout.node_replicas else self.layout.replicas

    def _gathered_together(self, matrices: list[ParameterShape]) -> list[list[ParameterShape]]:
        """Return matrices in groups whose weights replicas gather together."""
        together: dict[tuple, list[ParameterShape]] = {}
        for p in matrices:
            together.setdefault((self._set_of[p.name], p.itemsize(self.precision), self._block_of(p)), []).append(p)
        return list(together.values())

    def _in_sets(self, matrices: list[ParameterShape]) -> list[list[ParameterShape]]:
        """Return matrices in the sets whose gradients replicas sum together."""
        together: dict[int, list[ParameterShape]] = {}
        for p in matrices:
            together.setdefault(self._set_of[p.name], []).append(p)
        return list(together.values())

    def _even_shards(
        self, parameters: list[ParameterShape] | None = None
    ) -> dict[tuple[LevelPart | None, int], list[int]]:
        """Count a replica's entries of each set that `zero=1` updates, by part of a level and bytes of a weight.

        Counted are some of the parameters; None is all.
        """
        together: dict[tuple, list[ParameterShape]] = {}
        for p in self.parameters if parameters is None else parameters:
            if self.holdings.rule_of(p) == "adamw":
                together.setdefault((p.due, p.itemsize(self.precision), self._block_of(p)), []).append(p)
        result: dict[tuple[LevelPart | None, int], list[int]] = {}
        for (part, width, block), members in together.items():
            sizes = self._flat_sizes(members, is_one=block is not None)
            result.setdefault((part, width), []).extend(map(self._even_part, sizes))
        return result

    def _flat_sizes(self, members: list[ParameterShape], *, is_one: bool) -> list[int]:
        """Return the entries of the flat tensors, one or several, of parameters that are updated together."""
        sizes = {p.name: p.size for p in members}
        if is_one:
            return [sum(sizes.values())]
        if self.layout.flushes:
            parts = buckets(sizes, dict.fromkeys(sizes, 0), sizes, NODE_ELEMENTS)
        elif self.layout.node_replicas:
            return [sum(sizes.values())]
        else:
            parts = even_sets(sizes, sum(p.size for p in self.parameters))
        return [sum(sizes[name] for name in part) for part in parts]

    def _shards(self, due: Collection[LevelPart]) -> int:
        """Count a replica's shards of due weights: what is updated together is filled up to equal shards."""
        sizes: Counter[tuple] = Counter()
        for p in self.parameters:
            if self.holdings.rule_of(p) == "adamw" and (p.due is None or p.due in due):
                sizes[self.holdings.groups[p.name], p.due, p.itemsize(self.precision)] += p.size
        unit = SHARD_UNIT * self.layout.replicas
        return sum(itemsize * SHARD_UNIT * math.ceil(size / unit) for (_, _, itemsize), size in sizes.items())

    def _matrices(self, matrices: list[ParameterShape]) -> int:
        """Count gradients from equal parts to the owners of matrices, and updated weights back."""
        count = sum(map(self._to_owners, self._in_sets(matrices)))
        for alike in self._gathered_together(matrices):
            own = sum(p.size for p in alike if self.owners[p.name] == 0)
            count += alike[0].itemsize(self.precision) * (own + self._even_part(sum(p.size for p in alike)))
        return count

    def _gradients(self, matrices: list[ParameterShape]) -> int:
        """Count gradients and Gram matrices of matrices that replicas sum together, in equal parts."""
        return sum(self._rows(each[0].due, self._even_part(self._summed(each))) for each in self._in_sets(matrices))

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
        own = [p for p in holdings.matrices(self.layout, self.stage) if self.owners[p.name] == 0]
        held = holdings.tensor_owners(own, self.layout)
        chosen = [p for p in matrices if p.name in held]
        wholes = sum(tp * p.size * p.itemsize(self.precision) for p in chosen if held[p.name] == 0)
        return FP32 * sum(p.size + holdings.gram(p, tp) for p in chosen) + wholes
