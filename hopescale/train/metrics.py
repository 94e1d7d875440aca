"""Metrics of a step: numbers for the record, and the line for the console."""

from __future__ import annotations

import torch

from hopescale.config.layout import Layout
from hopescale.cost.flops import flops_per_token
from hopescale.cost.hardware import peak_bf16_flops
from hopescale.engine import Gradients
from hopescale.observe.console import format_step
from hopescale.observe.throughput import Throughput, peak_memory_gib
from hopescale.train.communication import PlannedCommunication
from hopescale.train.state import TrainState


class StepMetrics:
    """Collects the metrics of steps; on recorded steps every method is called by all ranks."""

    def __init__(self, state: TrainState, layout: Layout, device: torch.device):
        self.state, self.device, self._levels = state, device, state.levels
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
        """Return the loss, norms and rates of the step, and what its due levels did."""
        step, optimizer = self.state.step, self.state.optimizer
        values = {"loss": gradients.loss, "grad_norm": gradients.grad_norm}
        values |= {f"lr/{group}": rate for group, rate in optimizer.rates(step).items()}
        for level, norm in gradients.level_norms.items():
            cadence = optimizer.cadences[self._levels[level][0]]
            values |= {f"level/{level}/grad_norm": norm, f"level/{level}/updates": cadence.updates(step)}
            values |= self._planned.of_level(level)
        return values | {f"level/{level}/update_rms": change for level, change in changes.items()}

    def of_interval(self, gradients: Gradients) -> dict[str, float]:
        """Return bytes and speed since the last record, and statistics of all ranks."""
        steps = range(self._recorded + 1, self.state.step + 1)
        self._recorded = self.state.step
        return self._planned.of_steps(steps) | self._throughput.snapshot() | self._of_all_ranks(gradients)

    def _of_all_ranks(self, gradients: Gradients) -> dict[str, float]:
        """Return the highest device memory of all ranks, and the mean of the statistics of their memories."""
        stats = {name: value.item() for name, value in gradients.probe.items()}
        ranks = self.state.mesh.control.gather((stats, peak_memory_gib(self.device)))
        names = dict.fromkeys(name for of_rank, _ in ranks for name in of_rank)
        values = {name: [of_rank[name] for of_rank, _ in ranks if name in of_rank] for name in names}
        means = {name: sum(of_ranks) / len(of_ranks) for name, of_ranks in values.items()}
        return {"device_memory/peak_gib": max(peak for _, peak in ranks)} | means

    def line(self, gradients: Gradients, values: dict[str, float]) -> str:
        """Return the step as a line for the console."""
        step, steps = self.state.step, self.state.config.train.steps
        return format_step(
            step,
            steps,
            loss=gradients.loss,
            grad_norm=values["grad_norm"],
            lr=max(self.state.optimizer.rates(step).values()),
            memory_gib=values["device_memory/peak_gib"],
            tps=values["tps"],
            mfu=values.get("mfu"),
            eta_s=(steps - step) * values["time/step_s"],
            due=list(gradients.level_norms),
        )
