"""What a rank holds of the parameters, by rule and cadence: the entries behind every byte that outlives a step.

Which blocks a pipeline rank holds is decided here too, and which replica owns a matrix. Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from hopescale.config.groups import assign_groups
from hopescale.config.layout import Layout
from hopescale.config.model_shape import padded_vocab_size
from hopescale.config.schema import ModelConfig, RunConfig
from hopescale.cost.flops import block_flops
from hopescale.cost.operation import product
from hopescale.cost.params import ParameterShape, model_parameters
from hopescale.cost.updates import Work, assign_owners, state_entries, update_cost


def cut_blocks(model: ModelConfig, seq_len: int, num_stages: int) -> list[range]:
    """Cut the blocks into consecutive stages whose dearest costs least.

    Counted are the operations of the blocks and, on the last stage, of the head; looking up the embedding costs none.
    Of equally good cuts, the last stage takes the fewest blocks; the others differ by one at most, earlier ones more.

    Args:
        model: Sizes and switches; all blocks cost the same.
        seq_len: Tokens per sequence, which decide what a mixer costs.
        num_stages: Stages in all.

    Returns:
        Numbers of each stage's blocks, at least one.

    Raises:
        ValueError: If there are more stages than blocks.
    """
    if not 1 <= num_stages <= model.num_layers:
        raise ValueError(f"a model of {model.num_layers} blocks cannot be cut into {num_stages} stages")
    if num_stages == 1:
        return [range(model.num_layers)]
    block, head = block_flops(model, seq_len).total, product(1, model.d_model, padded_vocab_size(model)).total
    others = num_stages - 1

    def dearest(last: int) -> int:
        most = -(-(model.num_layers - last) // others)
        return max(most * block, last * block + head)

    last = min(range(1, model.num_layers - others + 1), key=dearest)
    each, more = divmod(model.num_layers - last, others)
    sizes = [each + (stage < more) for stage in range(others)] + [last]
    return [range(sum(sizes[:stage]), sum(sizes[: stage + 1])) for stage in range(num_stages)]


def slices_of_rank(model: ModelConfig, seq_len: int, pp: int, virtual_stages: int, rank: int) -> list[range]:
    """Return the blocks of each slice that pipeline rank `rank` of `pp` holds: slice `k` lives on rank `k % pp`.

    Raises:
        ValueError: If there are more slices than blocks.
    """
    return cut_blocks(model, seq_len, pp * virtual_stages)[rank::pp]


class Kind(NamedTuple):
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
    """Entries on one rank, before anything is divided over replicas.

    Attributes:
        entries: Entries of weights by kind.
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
        config: Config that has passed its checks.
    """

    def __init__(self, config: RunConfig):
        self.config = config
        self.groups = assign_groups({p.name: p.shape for p in model_parameters(config.model)}, config.optim.groups)
        self._cuts: dict[tuple, list[range]] = {}
        self._parameters: dict[tuple, list[ParameterShape]] = {}
        self._holdings: dict[tuple, Holding] = {}

    def rule_of(self, parameter: ParameterShape) -> str:
        """Return the name of the rule that updates a parameter."""
        return self.config.optim.groups[self.groups[parameter.name]].rule

    def slices(self, layout: Layout, stage: int) -> list[range]:
        """Return the blocks of each slice that a pipeline rank holds."""
        key = (layout.pp, layout.virtual_stages)
        if key not in self._cuts:
            cut = cut_blocks(self.config.model, self.config.train.seq_len, layout.pp * layout.virtual_stages)
            self._cuts[key] = cut
        return self._cuts[key][stage :: layout.pp]

    def parameters(self, layout: Layout, stage: int) -> list[ParameterShape]:
        """List this rank's slices of the parameters of a stage, in the order in which the optimizer knows them."""
        key = (layout.tp, layout.pp, layout.virtual_stages, stage)
        if key not in self._parameters:
            parameters = model_parameters(self.config.model, self.slices(layout, stage))
            self._parameters[key] = [parameter.slice(layout.tp) for parameter in parameters]
        return self._parameters[key]

    def matrices(self, layout: Layout, stage: int) -> list[ParameterShape]:
        """List those of `parameters` whose rule is one for matrices."""
        return [p for p in self.parameters(layout, stage) if self.rule_of(p) != "adamw"]

    def of_stage(self, layout: Layout, stage: int) -> Holding:
        """Return what each rank of a pipeline stage holds."""
        key = (layout.tp, layout.pp, layout.virtual_stages, stage)
        if key not in self._holdings:
            self._holdings[key] = self._sum(self.parameters(layout, stage), layout.tp)
        return self._holdings[key]

    def _sum(self, parameters: Iterable[ParameterShape], tp: int) -> Holding:
        entries, state, grams, largest = Counter(), Counter(), Counter(), 0
        for parameter in parameters:
            rule = self.rule_of(parameter)
            kind = Kind(rule, parameter.level, parameter.itemsize(self.config.train.precision))
            entries[kind] += parameter.size
            state[kind] += state_entries(rule, parameter.shape, self.config.optim)
            grams[kind] += self.gram(parameter, tp)
            largest = max(largest, parameter.size)
        return Holding(entries, state, grams, largest)

    def is_cut(self, parameter: ParameterShape) -> bool:
        """Tell whether a tensor-parallel rank holds parts of what a parameter's rule looks at: matrices, or rows."""
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
        level = self.config.model.cms.levels[parameter.level]
        return level.update_every_steps, level.phase

    def work(self, parameter: ParameterShape, layout: Layout) -> Work:
        """Return the update of a matrix, given as this rank's slice, as the optimizer assigns it to an owner."""
        rule, shape = self.rule_of(parameter), list(parameter.shape)
        if gathers(self.config, layout) and self.is_cut(parameter):
            shape[parameter.split] *= layout.tp
        cost = update_cost(rule, shape, self.config.optim)
        return Work(parameter.name, cost, (rule, tuple(shape)), self.cadence(parameter))

    def owners(self, layout: Layout, stage: int) -> dict[str, int]:
        """Return the replica that owns each parameter of a stage with a rule for matrices, as the optimizer does."""
        return assign_owners([self.work(p, layout) for p in self.matrices(layout, stage)], layout.dp)

    def owned_share(self, layout: Layout, stage: int) -> float:
        """Return the largest part of the matrices' entries that one replica owns."""
        owners, owned = self.owners(layout, stage), Counter()
        for parameter in self.matrices(layout, stage):
            owned[owners[parameter.name]] += parameter.size
        return max(owned.values()) / owned.total() if owned else 0.0


def gathers(config: RunConfig, layout: Layout) -> bool:
    """Tell whether rules for matrices see whole matrices of which tensor-parallel ranks hold slices."""
    return config.optim.tp_mode == "gather" and layout.tp > 1
