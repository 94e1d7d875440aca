"""Bytes that rank 0 sends while it trains, from the plan of the run: tests hold the plan to what is really sent."""

from __future__ import annotations

from collections import Counter
from functools import cache

from hopescale.config.layout import Layout
from hopescale.config.schema import RunConfig
from hopescale.cost.comm import bytes_of_step, bytes_to_sum_level, due_levels
from hopescale.cost.holdings import Holdings


class PlannedCommunication:
    """What the first rank of the first stage sends, as metrics."""

    def __init__(self, config: RunConfig, layout: Layout):
        self._config, self._layout = config, layout
        self._holdings = Holdings(config)
        self._of_step = cache(self._of_step)
        self._of_due_level = cache(self._of_due_level)

    def of_steps(self, steps: range) -> dict[str, float]:
        """Return the mean bytes per step since the last record, in all and by axis; empty for a run of one rank.

        On the last step the change of every due level is measured, which takes an exchange.
        """
        if self._layout.num_ranks == 1:
            return {}
        sent: Counter[str] = Counter()
        for step in steps:
            sent.update(self._of_step(due_levels(self._config, step), step == steps[-1]))
        axes = {f"comm/{axis}/bytes_per_step": count / len(steps) for axis, count in sent.items() if count}
        return {"comm/bytes_per_step": sent.total() / len(steps)} | axes

    def of_level(self, level: str) -> dict[str, float]:
        """Return the bytes by which replicas sum the gradients of a due level; empty where every step sums them all."""
        if self._layout.dp == 1 or self._config.parallel.zero > 1:
            return {}
        return {f"level/{level}/bytes": self._of_due_level(level)}

    def _of_step(self, due: frozenset[str], is_recorded: bool) -> dict[str, float]:
        levels = self._config.model.cms.levels
        measured = [level for level in due if is_recorded and levels[level].update_every_steps == 1]
        return bytes_of_step(self._holdings, self._config, self._layout, 0, due, measured=measured)

    def _of_due_level(self, level: str) -> int:
        return bytes_to_sum_level(self._holdings, self._config, self._layout, 0, level)
