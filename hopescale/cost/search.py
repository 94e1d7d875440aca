"""The fastest way to share a run out over devices that fits their memory. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from hopescale.config.execution import reverse_saves
from hopescale.config.layout import Layout
from hopescale.config.model_shape import attention_mixers, has_chunk_loop, kv_heads, padded_vocab_size
from hopescale.config.schema import RunConfig
from hopescale.cost.device_memory import device_memory_of_stage
from hopescale.cost.estimate import Estimate, Estimator
from hopescale.cost.holdings import Holdings

MOST_RANKS = 4096
"""Devices that are looked at, at most."""
USABLE = 0.92
"""Part of a device's memory that a plan fills: the rest is for the driver, for buffers of exchanges, and for gaps."""


@dataclass(frozen=True)
class LayoutChoice:
    """A way to run a config: with some settings, on some layout, with so many bytes on the fullest rank."""

    config: RunConfig
    layout: Layout
    peak: float
    estimate: Estimate

    def settings(self) -> dict[str, object]:
        """Return the chosen settings, by dotted key."""
        parallel = self.config.parallel
        return {
            **{f"parallel.{name}": value for name, value in self.layout.degrees.items()},
            "parallel.zero": parallel.zero,
            "parallel.shard": parallel.shard or "null",
            **({"parallel.ranks_per_node": parallel.ranks_per_node} if parallel.shard == "node" else {}),
            "parallel.shard_weights": parallel.shard_weights,
            "train.micro_batch_size": self.config.train.micro_batch_size,
            "train.recompute": self.config.train.recompute,
        }

    def changes(self, config: RunConfig, layout: Layout) -> dict[str, object]:
        """Return the settings that differ from those of another config and layout; replicas follow from the rest."""
        before = LayoutChoice(config, layout, 0, self.estimate).settings()
        found = self.settings()
        return {key: value for key, value in found.items() if value != before.get(key) and key != "parallel.dp"}

    def numbers(self) -> dict[str, object]:
        """Return the choice as numbers."""
        return {
            "ranks": self.layout.num_ranks,
            "settings": self.settings(),
            "peak": self.peak,
            "estimate": self.estimate.numbers(),
        }


def fullest(holdings: Holdings, config: RunConfig, layout: Layout, *, exact: bool = False) -> float:
    """Return the bytes of the fullest rank: on the first stage, which waits longest, or the last, with the logits."""
    stages = {0, layout.pp - 1}
    return max(device_memory_of_stage(holdings, config, layout, stage, exact=exact).peak for stage in stages)


def choices(estimator: Estimator, ranks: int) -> Iterator[LayoutChoice]:
    """Yield every way to share a config out over ranks that fits the device's memory."""
    holdings = estimator.holdings
    room, own = USABLE * estimator.device.memory, holdings.config.train.recompute
    for config, layout in _layouts(holdings.config, ranks, estimator.device.per_node):
        for size in _micro_batches(config, layout):
            fits = False
            for how in recompute_modes(config):
                if fits and how != own:
                    continue  # what keeps less only computes more
                candidate = replace(config, train=replace(config.train, micro_batch_size=size, recompute=how))
                peak = fullest(holdings, candidate, layout)
                if peak <= room:
                    fits = True
                    yield LayoutChoice(candidate, layout, peak, estimator.step(candidate, layout))


def can_be_partitioned(estimator: Estimator, ranks: int) -> bool:
    """Tell whether ranks can share a model and a batch evenly, whether it fits their memory or not."""
    layouts = _layouts(estimator.holdings.config, ranks, estimator.device.per_node)
    return any(_micro_batches(config, layout) for config, layout in layouts)


def best_choices(estimator: Estimator, ranks: int, count: int = 5) -> list[LayoutChoice]:
    """Return the fastest choices, each of other degrees, fastest first."""

    def order(choice: LayoutChoice) -> tuple[float, float]:
        return -choice.estimate.tps, choice.peak

    fastest: dict[tuple[int, int, int], LayoutChoice] = {}
    for choice in sorted(choices(estimator, ranks), key=order):
        fastest.setdefault((choice.layout.dp, choice.layout.tp, choice.layout.pp), choice)
    return sorted(fastest.values(), key=order)[:count]


@dataclass(frozen=True)
class Changes:
    """Two ways to make a run fit: with the fewest settings changed, and the fastest of all."""

    smallest: LayoutChoice
    fastest: LayoutChoice


def changes_that_fit(estimator: Estimator, config: RunConfig, layout: Layout) -> Changes | None:
    """Return the choice that fits and changes the fewest settings, the fastest of these, and the fastest of all.

    Where nothing fits on as many devices, their number is doubled until something does; None if nothing does.
    """
    ranks = layout.num_ranks
    while ranks <= MOST_RANKS:
        fitting = list(choices(estimator, ranks))
        if fitting:
            smallest = min(fitting, key=lambda choice: (len(choice.changes(config, layout)), -choice.estimate.tps))
            return Changes(smallest, max(fitting, key=lambda choice: choice.estimate.tps))
        ranks *= 2
    return None


def recompute_modes(config: RunConfig) -> tuple[str, ...]:
    """Return the modes of recomputation, from the one that keeps most to the one that keeps least."""
    loops = [mixer for mixer in config.model.mixers.values() if has_chunk_loop(mixer)]
    if not loops:
        return ("none", "memory", "block")
    reverse = ("reverse",) if all(reverse_saves(config.model, mixer) for mixer in loops) else ()
    return ("none", "chunks", *reverse, "memory", "block")


def _layouts(config: RunConfig, ranks: int, per_node: int) -> Iterator[tuple[RunConfig, Layout]]:
    """Yield layouts that split the model evenly, tensor-parallel ranks within a node."""
    model = config.model
    sizes = [model.num_heads, padded_vocab_size(model), *(level.d_ff for level in model.cms.levels.values())]
    sizes += [kv_heads(model, mixer) for mixer in attention_mixers(model).values()]
    cp = config.parallel.cp  # is not searched for
    for tp in _divisors(ranks // cp) if ranks % cp == 0 else ():
        if tp > per_node or any(size % tp for size in sizes):
            continue
        for pp in _divisors(ranks // cp // tp):
            if pp > model.num_layers or (pp > 1 and model.cms.placement == "depth"):
                continue
            dp = ranks // cp // tp // pp
            for zero, together in product(_zeros(config, dp * cp, pp), _sequences(config, tp)):
                layout = Layout(dp=dp, tp=tp, pp=pp, sequence_parallel=together, cp=cp)
                degrees = {"dp": dp, "tp": tp, "pp": pp, "virtual_stages": 1, "sequence_parallel": together}
                whole = replace(config.parallel, **degrees, zero=zero, shard=None, shard_weights=False)
                yield replace(config, parallel=whole), layout
                if zero == 1 and can_sum_in_nodes(config, layout, per_node):
                    for shares in {False, can_share_weights(config, layout)}:
                        tiers = {"zero": 0, "shard": "node", "ranks_per_node": per_node, "shard_weights": shares}
                        found = replace(config, parallel=replace(whole, **tiers))
                        yield found, replace(layout, node_replicas=per_node // tp)


def can_sum_in_nodes(config: RunConfig, layout: Layout, per_node: int) -> bool:
    """Tell whether a layout can go with `parallel.shard` of `node` on nodes of so many ranks."""
    inside, levels = per_node // layout.tp, config.model.cms.levels.values()
    moves = any(level.lag or level.wire != "fp32" for level in levels)
    return 1 < inside < layout.replicas and layout.replicas % inside == 0 and not (per_node % layout.tp or moves)


def can_share_weights(config: RunConfig, layout: Layout) -> bool:
    """Tell whether a layout can go with `parallel.shard_weights`."""
    whole = layout.tp == layout.pp == layout.cp == config.train.segments == 1
    return whole and not (config.train.compile or config.log.samples)


def _zeros(config: RunConfig, replicas: int, pp: int) -> set[int]:
    """Return the ZeRO stages to look at: 1 where there are replicas, and that of the config."""
    own, rules = config.parallel.stage, {group.rule for group in config.optim.groups.values()}
    if replicas == 1 or "adamw" not in rules:
        return {0}
    return {1} | ({own} if own < 2 or (pp == 1 and rules == {"adamw"}) else set())


def _sequences(config: RunConfig, tp: int) -> set[bool]:
    """Return whether to share tokens out between layers: where that can be, and as in the config."""
    pieces = config.parallel.cp * config.train.segments
    possible = tp > 1 and config.train.seq_len // pieces % tp == 0
    return {possible} | ({config.parallel.sequence_parallel} if possible else set())


def _micro_batches(config: RunConfig, layout: Layout) -> list[int]:
    """Return the micro batch sizes that divide a replica's part of the global batch, as powers of two."""
    sequences = config.train.global_batch_tokens // config.train.seq_len
    if sequences % layout.dp:
        return []
    share = sequences // layout.dp
    return [size for size in (2**i for i in range(share.bit_length())) if share % size == 0]


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]
