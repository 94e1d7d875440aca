"""The degrees of a run's axes, once the number of ranks is known."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from hopescale.common.errors import ConfigError, Problem
from hopescale.config.schema import RunConfig

AXES = ("dp", "pp", "tp")
"""The axes whose degree may be what remains, from the one whose neighbours are furthest apart."""


@dataclass(frozen=True)
class Layout:
    """How ranks are distributed.

    Attributes:
        dp: Data-parallel replicas.
        tp: Ranks per layer.
        pp: Pipeline stages.
        virtual_stages: Slices of the model per pipeline rank.
        sequence_parallel: Whether activations between layers are split over the `tp` ranks along the tokens.
        cp: Ranks that share the tokens of a sequence.
        node_replicas: Those of the `replicas` on a node, which sum gradients before nodes do; 0 if nodes play no part.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    virtual_stages: int = 1
    sequence_parallel: bool = False
    cp: int = 1
    node_replicas: int = 0

    @property
    def degrees(self) -> dict[str, int | bool]:
        """Chosen degrees, by their keys in `parallel`."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "node_replicas"}

    @property
    def nodes(self) -> int:
        """Nodes over which the `replicas` of a stage lie; 1 if nodes play no part."""
        return self.replicas // self.node_replicas if self.node_replicas else 1

    @property
    def flushes(self) -> bool:
        """Whether gradients of AdamW are summed inside nodes in each backward pass, not once in a step."""
        return self.node_replicas > 0 and self.pp == self.cp == 1

    @property
    def num_ranks(self) -> int:
        """Processes in all."""
        return self.replicas * self.tp * self.pp

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights, between which gradients are summed."""
        return self.dp * self.cp


def make_layout(config: RunConfig, num_ranks: int) -> Layout:
    """Divide the ranks of a job among the axes of a config; a degree that is null takes the remaining factor.

    Whether the model and the batch split that way is checked by `hopescale.config.check.check_layout`.

    Raises:
        ConfigError: If the degrees do not multiply to the number of ranks.
    """
    degrees = {axis: getattr(config.parallel, axis) for axis in AXES}
    unset = [axis for axis in AXES if degrees[axis] is None]
    assert len(unset) < 2, f"{unset} are null in a config that has passed its checks"
    fixed = {axis: degree for axis, degree in degrees.items() if degree is not None}
    if config.parallel.cp > 1:
        fixed["cp"] = config.parallel.cp
    product, job = math.prod(fixed.values()), f"{num_ranks} rank{'s' if num_ranks > 1 else ''}"
    written = f"{'*'.join(fixed)} = {'*'.join(map(str, fixed.values()))} = {product}"
    if unset:
        if num_ranks % product:
            message = f"{unset[0]} is what remains of {job}, but {written} does not divide {num_ranks}"
            keys = " or ".join(f"parallel.{axis}" for axis, degree in fixed.items() if degree > 1)
            hint = f"start {product} ranks or a multiple, as with --nproc {product}, or change {keys}"
            raise ConfigError([Problem("parallel", message, hint=hint)])
        return _with_nodes(config, replace(smallest_layout(config), **{unset[0]: num_ranks // product}))
    if product != num_ranks:
        model_ranks = product // fixed["dp"]
        hint = f"start {product} ranks, or change a degree"
        if num_ranks % model_ranks == 0:
            hint = f'set parallel.dp={num_ranks // model_ranks}, or leave it out for "what remains"'
        raise ConfigError([Problem("parallel", f"{written}, but the job has {job}", hint=hint)])
    return smallest_layout(config)


def smallest_layout(config: RunConfig) -> Layout:
    """Return the layout with the fewest ranks that a config allows: 1 for a degree that is null."""
    parallel = config.parallel
    degrees = (parallel.dp or 1, parallel.tp or 1, parallel.pp or 1)
    return _with_nodes(config, Layout(*degrees, parallel.virtual_stages, parallel.sequence_parallel, parallel.cp))


def _with_nodes(config: RunConfig, layout: Layout) -> Layout:
    """Return a layout in which nodes play a part in sums, if the config asks for it."""
    per_node = config.parallel.ranks_per_node if config.parallel.shard == "node" else 0
    return replace(layout, node_replicas=per_node // layout.tp)
