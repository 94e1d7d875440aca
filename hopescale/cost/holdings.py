"""What a rank holds of the parameters, by rule and cadence: the entries behind every byte that outlives a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from hopescale.config.groups import assign_groups
from hopescale.config.layout import Layout
from hopescale.config.schema import RunConfig
from hopescale.cost.inventory import ParameterInfo, block_parameters, model_parameters
from hopescale.cost.ownership import Work, assign_owners
from hopescale.cost.stages import cut_blocks
from hopescale.cost.updates import state_entries, update_cost

FP32 = 4


@dataclass(frozen=True)
class Kind:
    """Parameters that are treated alike.

    Attributes:
        rule: Name of the update rule.
        level: Name of the level; None if updated at every step.
        itemsize: Bytes of an entry.
    """

    rule: str
    level: str | None
    itemsize: int


@dataclass(frozen=True)
class Holding:
    """Entries on one rank, before anything is distributed over replicas.

    Attributes:
        entries: Of weights by kind.
        state: Entries of the rules' state by kind.
        grams: Entries of Gram matrices that are gathered beside gradients, by kind.
        largest: Entries of the largest tensor.
    """

    entries: Mapping[Kind, int]
    state: Mapping[Kind, int]
    grams: Mapping[Kind, int]
    largest: int

    def weight_bytes(self) -> int:
        """Return the bytes of all weights."""
        return sum(kind.itemsize * count for kind, count in self.entries.items())

    def total(self) -> int:
        """Return the entries of all weights."""
        return sum(self.entries.values())


class Holdings:
    """Finds what ranks hold, quickly for many layouts of one config.

    Args:
        config: A config that has passed its checks.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        model = config.model
        self.groups = assign_groups({p.name: p.shape for p in model_parameters(model)}, config.optim.groups)
        blocks = {number: tuple(block_parameters(model, number)) for number in range(model.num_layers)}
        self._blocks = blocks
        in_blocks = {p.name for parts in blocks.values() for p in parts}
        self._others = {p.name: p for p in model_parameters(model) if p.name not in in_blocks}
        self._cache: dict[tuple, Holding] = {}
        self._cuts: dict[tuple[int, int], list[range]] = {}

    def rule_of(self, parameter: ParameterInfo) -> str:
        """Return the name of the rule that updates a parameter."""
        return self.config.optim.groups[self.groups[parameter.name]].rule

    def slices(self, layout: Layout, stage: int) -> list[range]:
        """Return the blocks of each slice that a pipeline rank holds."""
        key = (layout.pp, layout.virtual_stages)
        if key not in self._cuts:
            cut = cut_blocks(self.config.model, self.config.train.seq_len, layout.pp * layout.virtual_stages)
            self._cuts[key] = cut
        return self._cuts[key][stage :: layout.pp]

    def is_cut(self, parameter: ParameterInfo) -> bool:
        """Tell whether a tensor-parallel rank holds parts of what a parameter's rule looks at: matrices, or rows."""
        looks_at = 1 if self.rule_of(parameter) == "dgd" else 2
        return parameter.split is not None and parameter.split >= len(parameter.shape) - looks_at

    def gram(self, parameter: ParameterInfo, tp: int) -> int:
        """Count the entries of the Gram matrix that is gathered beside the gradient of a rank's slice."""
        if self.rule_of(parameter) != "dgd":
            return 0
        joined = self.config.optim.tp_mode == "gather" and self.is_cut(parameter)
        return parameter.shape[-1] ** 2 * (tp if joined else 1)

    def of_stage(self, layout: Layout, stage: int) -> Holding:
        """Return what each rank of a pipeline stage holds."""
        model, key = self.config.model, (layout.tp, layout.pp, layout.virtual_stages, stage)
        if key not in self._cache:
            numbers = [number for blocks in self.slices(layout, stage) for number in blocks]
            names = {"embedding.weight"} if 0 in numbers else set()
            if model.num_layers - 1 in numbers:
                names |= {"norm.weight", "embedding.weight" if model.tie_embeddings else "head.weight"}
            parts = [self._of(("block", n, layout.tp), self._blocks[n], layout.tp) for n in numbers]
            parts += [self._of((name, layout.tp), [self._others[name]], layout.tp) for name in sorted(names)]
            self._cache[key] = _sum(parts)
        return self._cache[key]

    def _of(self, key: tuple, parameters: Iterable[ParameterInfo], tp: int) -> Holding:
        if key in self._cache:
            return self._cache[key]
        entries: Counter[Kind] = Counter()
        state: Counter[Kind] = Counter()
        grams: Counter[Kind] = Counter()
        largest = 0
        for parameter in parameters:
            rule, here = self.rule_of(parameter), parameter.slice(tp)
            kind = Kind(rule, parameter.level, parameter.itemsize(self.config.train.precision))
            entries[kind] += here.size
            state[kind] += state_entries(rule, here.shape, self.config.optim)
            grams[kind] += self.gram(here, tp)
            largest = max(largest, here.size)
        self._cache[key] = Holding(entries, state, grams, largest)
        return self._cache[key]

    def parameters(self, layout: Layout, stage: int) -> list[ParameterInfo]:
        """List this rank's slices of the parameters of a stage, in the order in which the optimizer knows them."""
        parameters = model_parameters(self.config.model, self.slices(layout, stage))
        return [parameter.slice(layout.tp) for parameter in parameters]

    def cadence(self, parameter: ParameterInfo) -> tuple[int, int]:
        """Return period and phase of a parameter's updates, in steps."""
        if parameter.level is None:
            return 1, 0
        level = self.config.model.cms.levels[parameter.level]
        return level.update_every_steps, level.phase

    def work(self, parameter: ParameterInfo, layout: Layout) -> Work:
        """Return the update of a matrix, given as this rank's slice, as the optimizer shares it out."""
        rule, shape = self.rule_of(parameter), list(parameter.shape)
        if gathers(self.config, layout) and self.is_cut(parameter):
            shape[parameter.split] *= layout.tp
        cost = update_cost(rule, shape, self.config.optim)
        return Work(parameter.name, cost, (rule, tuple(shape)), self.cadence(parameter))

    def owners(self, layout: Layout, stage: int) -> dict[str, int]:
        """Return the replica that owns each parameter of a stage with a rule for matrices, as the optimizer does."""
        matrices = [p for p in self.parameters(layout, stage) if self.rule_of(p) != "adamw"]
        return assign_owners([self.work(p, layout) for p in matrices], layout.dp)

    def owned_share(self, layout: Layout, stage: int) -> float:
        """Return the largest part of the matrices' entries that one replica owns."""
        owned: Counter[int] = Counter()
        owners = self.owners(layout, stage)
        for parameter in self.parameters(layout, stage):
            if parameter.name in owners:
                owned[owners[parameter.name]] += parameter.size
        return max(owned.values()) / owned.total() if owned else 0.0


def gathers(config: RunConfig, layout: Layout) -> bool:
    """Tell whether rules for matrices see whole matrices of which tensor-parallel ranks hold slices."""
    return config.optim.tp_mode == "gather" and layout.tp > 1


def _sum(parts: Iterable[Holding]) -> Holding:
    entries: Counter[Kind] = Counter()
    state: Counter[Kind] = Counter()
    grams: Counter[Kind] = Counter()
    largest = 0
    for part in parts:
        entries.update(part.entries)
        state.update(part.state)
        grams.update(part.grams)
        largest = max(largest, part.largest)
    return Holding(entries, state, grams, largest)
