"""Metrics of a step: numbers for the record, and the line for the console."""

from __future__ import annotations

from collections import Counter
from functools import cache

import torch
from torch import Tensor

from hopescale.config.layout import Layout
from hopescale.config.schema import RunConfig
from hopescale.cost.comm import SentBytes, due_parts, sent_parts
from hopescale.cost.flops import flops_per_token
from hopescale.cost.hardware import peak_bf16_flops
from hopescale.cost.holdings import Holdings
from hopescale.cost.parameter import LevelPart
from hopescale.engine import Gradients
from hopescale.observe.console import format_step
from hopescale.observe.throughput import Throughput, peak_memory_gib
from hopescale.optim import cadences_of_level
from hopescale.train.state import TrainState

TOKEN_STATS = ("eta", "alpha", "surprise")
"""Statistics of a token, in the order in which memories report them."""

MOST_VALUES = 4096
"""Values of which a distribution is shown, at most about twice as many."""


class StepMetrics:
    """Collects the metrics of steps; on recorded steps every method is called by all ranks."""

    def __init__(self, state: TrainState, layout: Layout, device: torch.device):
        self.state, self.device = state, device
        self._planned = PlannedCommunication(state.config, layout)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        flops = flops_per_token(state.config.model, state.config.train.seq_len)
        self._throughput = Throughput(
            num_devices=layout.num_ranks, flops_per_token=flops, peak_flops=peak_bf16_flops(name)
        )
        self._recorded = state.step

    def add_step(self, seconds: float, data_seconds: float) -> None:
        """Count the time of a step, and the part of it spent waiting for data."""
        self._throughput.add(self.state.config.train.global_batch_tokens, seconds, data_seconds)

    def of_updates(self, gradients: Gradients, changes: dict[str, float]) -> dict[str, float]:
        """Return the loss, norms and rates of the step, and the updates of its due levels."""
        step, optimizer = self.state.step, self.state.optimizer
        values = {"loss": gradients.loss, "grad_norm": gradients.grad_norm}
        values |= {f"lr/{group}": rate for group, rate in optimizer.rates(step).items()}
        for level, norm in gradients.level_norms.items():
            values |= {f"level/{level}/grad_norm": norm, f"level/{level}/updates": self._updates(level, step)}
            values |= self._planned.of_level(level, step)
        return values | {f"level/{level}/update_rms": change for level, change in changes.items()}

    def _updates(self, level: str, step: int) -> float:
        """Return the updates of a level up to a step, the mean of its blocks."""
        counts = [cadence.updates(step) for cadence in cadences_of_level(self.state.config.model, level).values()]
        return counts[0] if len(set(counts)) == 1 else sum(counts) / len(counts)

    def of_interval(self, gradients: Gradients) -> dict[str, float]:
        """Return bytes and speed since the last record, and statistics of all ranks."""
        steps = range(self._recorded + 1, self.state.step + 1)
        self._recorded = self.state.step
        return self._planned.of_steps(steps) | self._throughput.snapshot() | self._of_all_ranks(gradients)

    def _of_all_ranks(self, gradients: Gradients) -> dict[str, float]:
        """Return the highest device memory of all ranks, and the statistics of their memories joined."""
        stats = {name: value.item() for name, value in gradients.probe.items() if value.dim() == 0}
        ranks = self.state.mesh.control.gather((stats, peak_memory_gib(self.device)))
        names = dict.fromkeys(name for of_rank, _ in ranks for name in of_rank)
        values = {name: [of_rank[name] for of_rank, _ in ranks if name in of_rank] for name in names}
        joined = {
            name: max(of_ranks) if name.endswith("/state_norm") else sum(of_ranks) / len(of_ranks)
            for name, of_ranks in values.items()
        }
        return {"device_memory/peak_gib": max(peak for _, peak in ranks)} | joined

    def distributions(self, gradients: Gradients) -> dict[str, Tensor]:
        """Return statistics of memories on this rank at single tokens: some thousand values of each."""
        result = {}
        for name, rows in gradients.probe.items():
            layer, _, kind = name.rpartition("/")
            if kind == "tokens":
                chosen = rows[:: max(1, len(rows) // MOST_VALUES)].float().cpu()
                result |= {f"{layer}/{key}": column for key, column in zip(TOKEN_STATS, chosen.unbind(1), strict=True)}
        return result

    def line(self, gradients: Gradients, values: dict[str, float]) -> str:
        """Return the step as a line for the console."""
        step, steps = self.state.step, self.state.config.train.steps
        rate, left = max(self.state.optimizer.rates(step).values()), (steps - step) * values["time/step_s"]
        return format_step(step, steps, values | {"lr": rate, "eta_s": left}, list(gradients.level_norms))


class PlannedCommunication:
    """Bytes that rank 0 sends, from the plan of the run; tests compare the plan with the bytes that are really sent."""

    def __init__(self, config: RunConfig, layout: Layout):
        self._config, self._layout = config, layout
        self._sent = SentBytes(Holdings(config), layout, 0)
        self._of_step = cache(self._of_step)
        self._of_due_level = cache(self._sent.to_sum_level)

    def of_steps(self, steps: range) -> dict[str, float]:
        """Return the mean bytes per step since the last record, in all and by axis; empty for a run of one rank.

        On the last step the change of every due level is measured, which takes an exchange.
        """
        if self._layout.num_ranks == 1:
            return {}
        sent: Counter[str] = Counter()
        for step in steps:
            parts = due_parts(self._config, step), sent_parts(self._config, step)
            sent.update(self._of_step(*parts, step == steps[-1]))
        axes = {f"comm/{axis}/bytes_per_step": count / len(steps) for axis, count in sent.items() if count}
        return {"comm/bytes_per_step": sent.total() / len(steps)} | axes

    def of_level(self, level: str, step: int) -> dict[str, float]:
        """Return the bytes by which replicas sum a level's due gradients; empty where every step sums all."""
        if self._layout.replicas == 1 or self._config.parallel.stage > 1:
            return {}
        return {f"level/{level}/bytes": self._of_due_level(level, due_parts(self._config, step))}

    def _of_step(self, due: frozenset[LevelPart], gone: frozenset[LevelPart], is_recorded: bool) -> dict[str, float]:
        levels = self._config.model.cms.levels
        measured = [level for level, _ in due if is_recorded and levels[level].update_every_steps == 1]
        return self._sent.of_step(due, gone, measured=measured)
