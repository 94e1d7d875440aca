"""How long a step takes on given devices: an estimate from counts and a few open assumptions. Imports no torch.

docs/planning.md says what each assumption rests on.
"""

from __future__ import annotations

from dataclasses import dataclass

from hopescale.config.execution import effective_recompute, is_fused
from hopescale.config.layout import Layout
from hopescale.config.model_shape import has_chunk_loop, projection_chunk_size
from hopescale.config.plan import make_plan
from hopescale.config.schema import ModelConfig, RunConfig
from hopescale.cost.comm import stream_bytes
from hopescale.cost.flops import flops_by_part, flops_per_token
from hopescale.cost.hardware import Device
from hopescale.cost.holdings import Holding, Holdings
from hopescale.cost.operations import Flops
from hopescale.cost.updates import update_flops

MIXING_RATE = {"mlp": 0.30, "linear": 0.29, "static": 0.20}
"""Speed of memories' products in parts of that of large ones: of self-modifying memories, and of those that store
static values. Measured on a CPU (docs/performance.md)."""
FUSED_RATE = {"mlp": 1.34, "linear": 1.44, "static": 1.21}
"""The same where one operation runs all chunks, on a CPU: above 1, as it leaves out products that are known."""
FUSED_GPU_RATE = 1 / 6
"""The same on a GPU: float32 as three TF32 products, each at half the speed of bf16."""
CALLS_PER_CHUNK = {"mlp": 1000, "linear": 450, "static": 400}
"""Operations of a chunk's forward and backward that compute something, chunks computed again; as counted."""
UPDATE_PASSES = 6
"""Reads and writes of 4 bytes that an update makes of each entry, apart from its state's."""


@dataclass(frozen=True)
class Estimate:
    """A step, in seconds, and what follows from it.

    Attributes:
        compute_s: Forward and backward of the busiest stage, over all micro batches.
        idle_s: Waiting for other stages.
        tensor_s: Exchanges between tensor-parallel ranks.
        pipeline_s: Sends between stages.
        data_s: Gradients and weights between replicas.
        update_s: Updates.
        tokens: Of a step.
        model_flops: Of a step, nothing counted twice.
        ranks: Devices.
        peak_flops: Of a device.
        steps: Of the run.
    """

    compute_s: float
    idle_s: float
    tensor_s: float
    pipeline_s: float
    data_s: float
    update_s: float
    tokens: int
    model_flops: float
    ranks: int
    peak_flops: float
    steps: int

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self.compute_s + self.idle_s + self.tensor_s + self.pipeline_s + self.data_s + self.update_s

    @property
    def tps(self) -> float:
        """Tokens per second on all devices."""
        return self.tokens / self.step_s

    @property
    def mfu(self) -> float:
        """Model FLOPs of a second in parts of the devices' peak."""
        return self.model_flops / self.step_s / (self.ranks * self.peak_flops)

    @property
    def wall_s(self) -> float:
        """Seconds of the run."""
        return self.steps * self.step_s

    @property
    def device_hours(self) -> float:
        """Hours of all devices together."""
        return self.wall_s * self.ranks / 3600


class Estimator:
    """Estimates steps of one model on one kind of device, for many layouts.

    Args:
        holdings: Of the config's model and optimizer.
        device: Of each rank.
        efficiency: Part of the peak that large products reach; None is the device's.
    """

    def __init__(self, holdings: Holdings, device: Device, efficiency: float | None = None):
        self.holdings, self.device = holdings, device
        self.rate = device.peak_flops * (efficiency or device.efficiency)
        config = holdings.config
        self.model_flops = flops_per_token(config.model, config.train.seq_len)
        self._parts: dict[str, dict[str, Flops]] = {}
        self._updates: dict[tuple, float] = {}

    def step(self, config: RunConfig, layout: Layout) -> Estimate:
        """Estimate a step of a config, which may differ from the holdings' in micro batch, ZeRO and recomputation."""
        train, plan = config.train, make_plan(config, layout)
        micro = plan.grad_accumulation
        stages = [self._stage_s(config, layout, stage) for stage in {0, layout.pp - 1}]
        busiest = max(stages)
        idle = (layout.pp - 1) / layout.virtual_stages * busiest
        tensor = self._tensor_s(config, layout) * (micro + (layout.pp - 1) / layout.virtual_stages)
        sends = 2 * layout.virtual_stages * micro if layout.pp > 1 else 0
        across = self._bandwidth(layout.tp * layout.dp * layout.pp)
        share = layout.tp if layout.sequence_parallel else 1
        holding = self.holdings.of_stage(layout, 0)
        return Estimate(
            compute_s=micro * busiest,
            idle_s=idle,
            tensor_s=tensor,
            pipeline_s=sends * stream_bytes(config) / share / across,
            data_s=self._data_s(config, layout, holding, micro),
            update_s=self._update_s(config, layout, holding),
            tokens=train.global_batch_tokens,
            model_flops=self.model_flops * train.global_batch_tokens,
            ranks=layout.num_ranks,
            peak_flops=self.device.peak_flops,
            steps=train.steps,
        )

    def assumptions(self) -> list[str]:
        """Say what the estimate takes for granted."""
        model, device = self.holdings.config.model, self.device
        lines = [f"large products reach {self.rate / device.peak_flops:.0%} of the peak"]
        if model.mixer != "attention":
            if is_fused(self.holdings.config):
                lines.extend(self._fused_assumptions())
            else:
                lines.append(f"products of memories reach {mixing_rate(model):.0%} of that, as on a CPU")
            if self._calls_s(self.holdings.config, 1):
                calls = CALLS_PER_CHUNK[kind_of_memory(model)]
                lines.append(
                    f"a chunk is {calls:,} calls, one after the other, of {1e6 * device.call_s:.0f} us at least"
                )
        if device.name != "cpu":
            links = (
                f"{device.link / 1e9:.0f} GB/s within a node of {device.per_node}, {device.network / 1e9:.0f} beyond"
            )
            lines.append(f"a device sends {links}; nothing is sent while it computes")
        return lines

    def _fused_assumptions(self) -> list[str]:
        rate = self._fused_rate(self.holdings.config)
        if self.device.name == "cpu":
            return [f"one operation runs all chunks of memories, at {rate:.0%} of that"]
        return [
            f"one operation runs all chunks of memories, at {rate:.0%} of that: float32 by TF32",
            f"a head of a sequence is one program, and {self.device.units} run at a time",
        ]

    def _fused_rate(self, config: RunConfig) -> float:
        return FUSED_RATE[kind_of_memory(config.model)] if self.device.name == "cpu" else FUSED_GPU_RATE

    def _mixing_s(self, config: RunConfig, layout: Layout, flops: float, blocks: int) -> float:
        """Return the seconds of a micro batch's products between the maps, `flops` in all, of some blocks."""
        if is_fused(config):
            programs = config.model.num_heads / layout.tp * config.train.micro_batch_size
            return flops / (self.rate * self._fused_rate(config) * min(1.0, programs / self.device.units))
        in_calls = blocks * self._calls_s(config, config.train.seq_len)
        return max(flops / (self.rate * mixing_rate(config.model)), in_calls)

    def _flops(self, config: RunConfig) -> dict[str, Flops]:
        how = effective_recompute(config)
        if how not in self._parts:
            self._parts[how] = flops_by_part(config.model, config.train.seq_len, recompute=how)
        return self._parts[how]

    def _stage_s(self, config: RunConfig, layout: Layout, stage: int) -> float:
        """Return the seconds of a micro batch's forward and backward on a stage."""
        model, train = config.model, config.train
        slices = self.holdings.slices(layout, stage)
        blocks, tokens = sum(map(len, slices)), train.seq_len * train.micro_batch_size
        parts, share = self._flops(config), blocks / model.num_layers / layout.tp
        dense = (parts["maps"].total + parts["levels"].total) * share
        if slices[-1].stop == model.num_layers:
            dense += parts["head"].total / layout.tp
        mixing = self._mixing_s(config, layout, parts["mixing"].total * share * tokens, blocks)
        return dense * tokens / self.rate + mixing

    def _calls_s(self, config: RunConfig, seq_len: int) -> float:
        """Return the least seconds of a mixer's chunk loop: calls of operations, one after the other."""
        model = config.model
        if model.mixer == "attention" or not has_chunk_loop(model.self_modifying) or is_fused(config):
            return 0.0
        chunks = seq_len / projection_chunk_size(model)
        return chunks * CALLS_PER_CHUNK[kind_of_memory(model)] * self.device.call_s

    def _bandwidth(self, ranks: int) -> float:
        return self.device.link if ranks <= self.device.per_node else self.device.network

    def _tensor_s(self, config: RunConfig, layout: Layout) -> float:
        """Return the seconds of a micro batch's sums over tensor-parallel ranks, each a ring there and back."""
        if layout.tp == 1:
            return 0.0
        model = config.model
        sums = 2 if model.cms.variant == "independent" else 1 + len(model.cms.levels)
        passes = 3 if config.train.recompute == "block" else 2
        volume = model.num_layers / layout.pp * sums * passes * 2 * (layout.tp - 1) / layout.tp * stream_bytes(config)
        return volume / self._bandwidth(layout.tp)

    def _data_s(self, config: RunConfig, layout: Layout, holding: Holding, micro: int) -> float:
        """Return the seconds of the exchange between replicas, averaged over cadences."""
        dp, zero = layout.dp, config.parallel.zero
        if dp == 1:
            return 0.0
        due = {kind: count * self._rate_of(kind.level) for kind, count in holding.entries.items()}
        gradients = 4 * sum(due.values() if zero < 2 else holding.entries.values()) * (micro if zero >= 2 else 1)
        shared = zero or any(kind.rule != "adamw" for kind in due)
        weights = sum(kind.itemsize * count for kind, count in due.items()) if shared else gradients
        if zero == 3:
            weights = 2 * micro * holding.weight_bytes()
        return (gradients + weights) * (dp - 1) / dp / self._bandwidth(layout.tp * dp)

    def _rate_of(self, level: str | None) -> float:
        """Return the updates of a level per step."""
        levels = self.holdings.config.model.cms.levels
        return 1.0 if level is None else 1 / levels[level].update_every_steps

    def _update_s(self, config: RunConfig, layout: Layout, holding: Holding) -> float:
        """Return the seconds of updates, averaged over cadences: the rules' products, and memory read and written."""
        shares = {"adamw": 1 / layout.dp if config.parallel.zero else 1.0}
        moved = 0.0
        for kind, count in holding.entries.items():
            each = 4 * (UPDATE_PASSES * count + 2 * holding.state[kind])
            moved += each * shares.get(kind.rule, 1 / layout.dp) * self._rate_of(kind.level)
        return moved / self.device.bandwidth + self._rule_flops(layout) / layout.dp / self.rate

    def _rule_flops(self, layout: Layout) -> float:
        key = (layout.tp, layout.pp)
        if key not in self._updates:
            optim, total = self.holdings.config.optim, 0.0
            if any(group.rule != "adamw" for group in optim.groups.values()):
                for parameter in self.holdings.parameters(Layout(tp=layout.tp, pp=layout.pp), 0):
                    rule = self.holdings.rule_of(parameter)
                    total += update_flops(rule, parameter.shape, optim) * self._rate_of(parameter.level)
            self._updates[key] = total
        return self._updates[key]


def mixing_rate(model: ModelConfig) -> float:
    """Return the speed of a mixer's products between its maps, in parts of that of large products."""
    return 1.0 if model.mixer == "attention" else MIXING_RATE[kind_of_memory(model)]


def kind_of_memory(model: ModelConfig) -> str:
    """Return what decides the speed of memories: `mlp` or `linear` if they make what is written, else `static`."""
    mixer = model.self_modifying
    return mixer.memory if mixer.adaptive or mixer.query == "memory" else "static"
