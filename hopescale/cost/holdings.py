"""Parameters that a rank holds, by rule and cadence: the entries behind every byte that outlives a step.

Which blocks a pipeline rank holds is decided here too, and which replica owns a matrix. Imports no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import NamedTuple

from hopescale.config.groups import assign_groups
from hopescale.config.layout import Layout
from hopescale.config.model_shape import block_pattern, padded_vocab_size
from hopescale.config.schema import MixerConfig, ModelConfig, RunConfig
from hopescale.cost.flops import block_flops
from hopescale.cost.operation import product
from hopescale.cost.parameter import LevelPart, ParameterShape
from hopescale.cost.params import model_parameters
from hopescale.cost.updates import Work, assign_owners, state_entries, update_cost


def cut_blocks(model: ModelConfig, seq_len: int, num_stages: int) -> list[range]:
    """Cut the blocks into consecutive stages whose dearest costs least.

    Counted are the operations of the blocks and, on the last stage, of the head; looking up the embedding costs none.
    Of equally good cuts, the last stage takes the fewest blocks; the others cost as much as their average as far as
    they can, earlier ones more. Tokens per sequence decide what a mixer costs.

    Returns:
        Numbers of each stage's blocks, at least one.

    Raises:
        ValueError: If there are more stages than blocks.
    """
    if not 1 <= num_stages <= model.num_layers:
        raise ValueError(f"a model of {model.num_layers} blocks cannot be cut into {num_stages} stages")
    if num_stages == 1:
        return [range(model.num_layers)]
    each = {name: _block_cost(model, mixer, seq_len) for name, mixer in model.mixers.items()}
    costs = [each[name] for name in block_pattern(model)]
    head = round(product(1, model.d_model, padded_vocab_size(model)).total)
    least, most = max(*costs, costs[-1] + head), sum(costs) + head
    while least < most:
        limit = (least + most) // 2
        least, most = (least, limit) if _cut(costs, num_stages, limit, head) else (limit + 1, most)
    first = len(costs) - _cut(costs, num_stages, most, head)[-1]
    sizes = [*_even(costs[:first], num_stages - 1, most), len(costs) - first]
    return [range(sum(sizes[:stage]), sum(sizes[: stage + 1])) for stage in range(num_stages)]


def _block_cost(model: ModelConfig, mixer: MixerConfig, seq_len: int) -> int:
    return round(sum(part.total for part in block_flops(model, mixer, seq_len).values()))


def _cut(costs: list[int], num_stages: int, limit: int, head: int = 0) -> list[int] | None:
    """Return sizes of stages that cost at most `limit` each, earlier ones filled first; None if there are none."""
    sizes = []
    for stage in range(num_stages - 1):
        begin, size, cost = sum(sizes), 0, 0
        others = num_stages - stage - 1
        while begin + size + others < len(costs) and cost + costs[begin + size] <= limit:
            cost += costs[begin + size]
            size += 1
        if size == 0:
            return None
        sizes.append(size)
    rest = costs[sum(sizes) :]
    return [*sizes, len(rest)] if sum(rest) + head <= limit else None


def _even(costs: list[int], num_stages: int, limit: int) -> list[int]:
    """Return sizes of stages that cost at most `limit` each: every one the least that the average of the rest asks."""
    if num_stages == 1:
        return [len(costs)]
    most = _cut(costs, num_stages, limit)[0]
    size, average = 1, sum(costs) / num_stages
    while size < most and (sum(costs[:size]) < average or not _cut(costs[size:], num_stages - 1, limit)):
        size += 1
    return [size, *_even(costs[size:], num_stages - 1, limit)]


class Kind(NamedTuple):
    """Parameters treated alike: update rule, level (None is updated at every step), bytes of an entry, phase."""

    rule: str
    level: str | None
    itemsize: int
    phase: int = 0

    @property
    def due(self) -> LevelPart | None:
        """What is updated at the same steps; None is updated at every step."""
        return None if self.level is None else (self.level, self.phase)


@dataclass(frozen=True)
class Holding:
    """Entries on one rank by kind, before anything is divided over replicas, and entries of the largest tensor.

    Gram matrices are those that are gathered beside gradients, `outside` the entries that are in no block. The largest
    matrix is the one that a rule sees, the largest class are all matrices of one shape that are updated together. State
    of matrices that are gathered is that of wholes, shared out evenly over tensor-parallel ranks.
    """

    entries: Mapping[Kind, int]
    state: Mapping[Kind, float]
    grams: Mapping[Kind, int]
    largest: int
    outside: Mapping[Kind, int]
    largest_matrix: int
    largest_class: int

    def weight_bytes(self) -> int:
        """Return the bytes of all weights."""
        return sum(kind.itemsize * count for kind, count in self.entries.items())

    def total(self) -> int:
        """Return the entries of all weights."""
        return sum(self.entries.values())


class Holdings:
    """Finder of the holdings of ranks, quick for many layouts of a config that has passed its checks.

    Attributes:
        groups: Group of each parameter, by name.
        watched: Maps of levels, `(level, "gate")`, whose inputs are looked at in the backward pass, as by `dgd`.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        self.groups = assign_groups({p.name: p.shape for p in model_parameters(config.model)}, config.optim.groups)
        names = (name.split(".") for name in self.groups if self.rule_of_name(name) == "dgd")
        self.watched = frozenset((parts[-3], parts[-2]) for parts in names if parts[-4:-3] == ["levels"])
        self._cut = cache(partial(cut_blocks, config.model, config.train.seq_len))
        self._slices_of_parameters = cache(self._cut_parameters)
        self._holding = cache(self._sum)

    def rule_of(self, parameter: ParameterShape) -> str:
        """Return the name of the rule that updates a parameter."""
        return self.rule_of_name(parameter.name)

    def rule_of_name(self, name: str) -> str:
        """Return the name of the rule that updates the parameter of a name."""
        return self.config.optim.groups[self.groups[name]].rule

    def slices(self, layout: Layout, stage: int) -> list[range]:
        """Return the blocks of each slice that a pipeline rank holds."""
        return self._cut(layout.pp * layout.virtual_stages)[stage :: layout.pp]

    def parameters(self, layout: Layout, stage: int) -> list[ParameterShape]:
        """List this rank's slices of the parameters of a stage, in the order in which the optimizer knows them."""
        return self._slices_of_parameters(_one_replica(layout), stage)

    def _cut_parameters(self, layout: Layout, stage: int) -> list[ParameterShape]:
        parameters = model_parameters(self.config.model, self.slices(layout, stage))
        return [parameter.slice(layout.tp) for parameter in parameters]

    def matrices(self, layout: Layout, stage: int) -> list[ParameterShape]:
        """List those of `parameters` whose rule is one for matrices."""
        return [p for p in self.parameters(layout, stage) if self.rule_of(p) != "adamw"]

    def of_stage(self, layout: Layout, stage: int) -> Holding:
        """Return the holdings of each rank of a pipeline stage."""
        return self._holding(_one_replica(layout), stage)

    def _sum(self, layout: Layout, stage: int) -> Holding:
        entries, state, grams, outside, classes = Counter(), Counter(), Counter(), Counter(), Counter()
        largest, largest_matrix = 0, 0
        for parameter in self.parameters(layout, stage):
            rule = self.rule_of(parameter)
            kind = Kind(rule, parameter.level, parameter.itemsize(self.config.train.precision), parameter.phase)
            entries[kind] += parameter.size
            shape = self._updated_shape(parameter, layout)
            parts = layout.tp if self.is_gathered(parameter, layout) else 1
            state[kind] += state_entries(rule, shape, self.config.optim) / parts
            outside[kind] += parameter.size if parameter.block is None else 0
            grams[kind] += self.gram(parameter, layout.tp)
            largest = max(largest, parameter.size)
            if rule != "adamw":
                largest_matrix = max(largest_matrix, math.prod(shape))
                classes[kind, parameter.shape] += parameter.size
        return Holding(entries, state, grams, largest, outside, largest_matrix, max(classes.values(), default=0))

    def is_cut(self, parameter: ParameterShape) -> bool:
        """Tell whether a tensor-parallel rank holds only parts of the matrices, or rows, that a rule needs whole."""
        looks_at = 1 if self.rule_of(parameter) == "dgd" else 2
        return parameter.split is not None and parameter.split >= len(parameter.shape) - looks_at

    def gram(self, parameter: ParameterShape, tp: int) -> int:
        """Count the entries of the Gram matrix that is gathered beside the gradient of a rank's slice."""
        if self.rule_of(parameter) != "dgd":
            return 0
        joined = self.config.optim.tp_mode == "gather" and self.is_cut(parameter)
        return parameter.shape[-1] ** 2 * (tp if joined else 1)

    def cadence(self, parameter: ParameterShape) -> tuple[int, int]:
        """Return period and phase of a parameter's updates, in steps."""
        if parameter.level is None:
            return 1, 0
        return self.config.model.cms.levels[parameter.level].update_every_steps, parameter.phase

    def work(self, parameter: ParameterShape, layout: Layout) -> Work:
        """Return the update of a matrix, given as this rank's slice, as the optimizer assigns it to an owner."""
        rule, shape = self.rule_of(parameter), self._updated_shape(parameter, layout)
        cost = update_cost(rule, shape, self.config.optim, parameter.parts)
        return Work(parameter.name, cost, (rule, shape, parameter.parts), self.cadence(parameter))

    def _updated_shape(self, parameter: ParameterShape, layout: Layout) -> tuple[int, ...]:
        """Return the shape in which a parameter, given as this rank's slice, is updated: whole if it is gathered."""
        shape = list(parameter.shape)
        if self.is_gathered(parameter, layout):
            shape[parameter.split] *= layout.tp
        return tuple(shape)

    def is_gathered(self, parameter: ParameterShape, layout: Layout) -> bool:
        """Tell whether slices of a parameter are gathered on one tensor-parallel rank for its update."""
        return gathers(self.config, layout) and self.rule_of(parameter) != "adamw" and self.is_cut(parameter)

    def owners(self, layout: Layout, stage: int) -> dict[str, int]:
        """Return the replica that owns each parameter of a stage with a rule for matrices, as the optimizer does."""
        return assign_owners([self.work(p, layout) for p in self.matrices(layout, stage)], layout.replicas)

    def tensor_owners(self, matrices: Sequence[ParameterShape], layout: Layout) -> dict[str, int]:
        """Return the tensor-parallel rank that updates each matrix of a replica whose slices are gathered."""
        gathered = [p for p in matrices if self.is_gathered(p, layout)]
        return assign_owners([self.work(p, layout) for p in gathered], layout.tp)

    def owned_share(self, layout: Layout, stage: int) -> float:
        """Return the largest number of the matrices' entries that one rank updates, per entry that each rank holds."""
        owners, matrices = self.owners(layout, stage), self.matrices(layout, stage)
        of_replica: dict[int, list[ParameterShape]] = {}
        for parameter in matrices:
            of_replica.setdefault(owners[parameter.name], []).append(parameter)
        most = 0
        for own in of_replica.values():
            wholes = self.tensor_owners(own, layout)
            updated = Counter(dict.fromkeys(range(layout.tp), sum(p.size for p in own if p.name not in wholes)))
            for parameter in own:
                if parameter.name in wholes:
                    updated[wholes[parameter.name]] += layout.tp * parameter.size
            most = max(most, *updated.values())
        return most / sum(p.size for p in matrices) if matrices else 0.0


def _one_replica(layout: Layout) -> Layout:
    """Return the part of a layout that decides which parameters a rank holds."""
    return replace(layout, dp=1, cp=1, sequence_parallel=False)


def gathers(config: RunConfig, layout: Layout) -> bool:
    """Tell whether rules for matrices see whole matrices of which tensor-parallel ranks hold slices."""
    return config.optim.tp_mode == "gather" and layout.tp > 1
