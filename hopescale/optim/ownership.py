"""The owner of each matrix: the replica, and where slices are gathered the tensor-parallel rank, that updates it.

`assign_owners` in `cost/updates.py` deals the matrices out, so that a plan knows the same owners.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from hopescale.config.schema import OptimConfig
from hopescale.cost.updates import Work, assign_owners, update_cost
from hopescale.optim.cadence import Cadence
from hopescale.parallel.mesh import Mesh


class Ownership:
    """Owners of matrices, in parts of equal cost for each cadence, the same on every rank.

    Args:
        parameters: Parameters by name.
        rules: Name of the update rule of each parameter.
        config: Settings of the rules, and `tp_mode`.
        cadences: Cadence of every parameter.
        mesh: Ranks of this process.

    Attributes:
        replica: Data-parallel rank that owns each parameter.
        shape: Shape in which each parameter is updated: whole if its slices are gathered.
        tp_rank: Tensor-parallel rank that owns each parameter whose slices are gathered; no others.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rules: Mapping[str, str],
        config: OptimConfig,
        cadences: Mapping[str, Cadence],
        mesh: Mesh,
    ):
        self._dp_group, self._tp = mesh.dp_group, mesh.tp_group.size()
        gathers = config.tp_mode == "gather" and self._tp > 1
        sliced = {name for name, p in parameters.items() if gathers and _slices_matrices(p, rules[name])}
        self.shape = {
            name: p.spec.whole_shape(p.shape, self._tp if name in sliced else 1) for name, p in parameters.items()
        }
        work = [
            Work(name, update_cost(rules[name], shape, config, parts), (rules[name], shape, parts), cadences[name])
            for name, shape in self.shape.items()
            for parts in [parameters[name].spec.parts]
        ]
        self.replica = assign_owners(work, self._dp_group.size())
        self.tp_rank: dict[str, int] = {}
        for replica in range(self._dp_group.size()):
            gathered = [each for each in work if self.replica[each.name] == replica and each.name in sliced]
            self.tp_rank |= assign_owners(gathered, self._tp)

    def is_gathered(self, name: str) -> bool:
        """Tell whether the slices of a parameter are gathered on one tensor-parallel rank for its update."""
        return name in self.tp_rank

    def is_here(self, name: str) -> bool:
        """Tell whether this replica owns a parameter."""
        return self.replica[name] == self._dp_group.rank()

    def rounds(self, classes: Mapping[int, Sequence[str]], most: int) -> list[list[int]]:
        """Cut classes of parameters into rounds in which no rank updates more than so many entries, or one class.

        The rounds are the same on all ranks, which exchange something in between.
        """
        result: list[list[int]] = []
        updated: Counter[tuple[int, int]] = Counter()
        for number, names in classes.items():
            own: Counter[tuple[int, int]] = Counter()
            for name in names:
                for rank in [self.tp_rank[name]] if name in self.tp_rank else range(self._tp):
                    own[self.replica[name], rank] += math.prod(self.shape[name])
            updated = updated + own
            if not result or max(updated.values()) > most:
                result, updated = [*result, []], own
            result[-1].append(number)
        return result


def _slices_matrices(parameter: nn.Parameter, rule: str) -> bool:
    """Tell whether a tensor-parallel rank holds only parts of the matrices, or rows, that a rule needs whole."""
    split, looks_at = parameter.spec.partition_dim, 1 if rule == "dgd" else 2
    return split is not None and split >= parameter.dim() - looks_at
