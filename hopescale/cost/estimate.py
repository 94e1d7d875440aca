"""How long a step takes on given devices: an estimate from counts and a few open assumptions. Imports no torch.

docs/planning.md says what each assumption rests on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import chain

from hopescale.config.execution import effective_recompute, is_fused, kernel_products, run_again
from hopescale.config.layout import Layout
from hopescale.config.model_shape import (
    attention_mixers,
    block_pattern,
    has_chunk_loop,
    memory_parts,
    mixer_counts,
    padded_vocab_size,
    projection_chunk_size,
)
from hopescale.config.plan import make_plan
from hopescale.config.schema import (
    AttentionConfig,
    MixerConfig,
    ModelConfig,
    RunConfig,
    SelfModifyingConfig,
    TitansConfig,
)
from hopescale.cost.carried import chunks_rerun, handed_on
from hopescale.cost.comm import stream_bytes
from hopescale.cost.flops import block_flops, flops_per_token
from hopescale.cost.hardware import Device
from hopescale.cost.holdings import Holdings, Kind
from hopescale.cost.operation import OpCost, product
from hopescale.cost.parameter import FP32
from hopescale.cost.roofline import (
    COUNTED_ON,
    READY,
    between_products_seconds,
    equal_transformer,
    instructions,
    memory_seconds,
    programs_at_once,
)
from hopescale.cost.updates import WIRE_BLOCK, update_flops, wire_bytes

MIXING_RATE = {"mlp": 0.30, "linear": 0.29, "static": 0.20}
"""Speed of memories' products in parts of that of large ones: of self-modifying memories, and of those that store
static values. Measured on a CPU (docs/performance.md)."""
FUSED_RATE = {"mlp": 1.34, "linear": 1.44, "static": 1.21}
"""The same where one operation runs all chunks, on a CPU: above 1, as it leaves out products that are known."""
CALLS_PER_CHUNK = {"mlp": 1000, "linear": 450, "static": 400}
"""Operations of a chunk's forward and backward that compute something, chunks computed again; as counted."""
CALLS_NOT_COUNTED = {
    "linear_attention": "linear attention's chunks",
    "ttt": "TTT's mini-batches",
    "mac": "MAC's segments",
}
"""What runs piece by piece on a GPU, and is planned as if it ran at once; by kind, or by composition."""
UPDATE_PASSES = 6
"""Reads and writes of 4 bytes that an update makes of each entry, apart from its state's."""
Flops = Callable[[MixerConfig, str], dict[str, OpCost]]
"""Counts a block's operations by its mixer and what is computed again."""
PARTS = ("compute", "idle", "tensor", "context", "pipeline", "data", "update")
"""Parts of a step's time: forward and backward of the busiest stage, waiting for other stages and for the ranks before
in a sequence, exchanges between tensor-parallel ranks, states handed on along sequences, sends between stages,
gradients and weights between replicas, updates."""


@dataclass(frozen=True)
class Estimate:
    """Estimate of a step of a run on some ranks, and of the run."""

    seconds: dict[str, float]
    """Seconds by part, as in `PARTS`."""
    tokens: int
    model_flops: float
    """Model FLOPs of a step, nothing counted twice."""
    ranks: int
    peak_flops: float
    """Peak FLOP/s of a device."""
    steps: int

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return sum(self.seconds.values())

    @property
    def tps(self) -> float:
        """Tokens per second on all devices."""
        return self.tokens / self.step_s

    @property
    def mfu(self) -> float:
        """Model FLOPs of a second in parts of the devices' peak."""
        return self.model_flops / self.step_s / (self.ranks * self.peak_flops)

    def numbers(self) -> dict[str, float]:
        """Return seconds of a step, in all and by part, its speed, and the time of the run."""
        wall = self.steps * self.step_s
        return {
            "step_s": self.step_s,
            **{f"{part}_s": seconds for part, seconds in self.seconds.items()},
            "tps": self.tps,
            "mfu": self.mfu,
            "wall_s": wall,
            "device_hours": wall * self.ranks / 3600,
        }


class Estimator:
    """Estimates steps of one model on one kind of device, for many layouts.

    The efficiency is the part of the peak that large products reach; None is the device's.
    """

    def __init__(self, holdings: Holdings, device: Device, efficiency: float | None = None):
        self.holdings, self.device = holdings, device
        self.rate = device.peak_flops * (efficiency or device.efficiency)
        config = holdings.config
        self.model_flops = flops_per_token(config.model, config.train.seq_len)
        self._flops = cache(partial(self._flops_of_block, config.model))
        self._rule_flops = cache(self._flops_of_rules)

    def step(self, config: RunConfig, layout: Layout) -> Estimate:
        """Estimate a step of a config, which may differ from the holdings' in micro batch, ZeRO and recomputation."""
        train, micro_batches = config.train, make_plan(config, layout).grad_accumulation
        busiest = max(self._stage_s(config, layout, stage) for stage in {0, layout.pp - 1})
        waits = (layout.pp - 1) / layout.virtual_stages
        # Ranks that share sequences wait for the first state, and for the last gradient, once for two micro batches.
        in_ring = -(-micro_batches // 2) * (layout.cp - 1) * layout.pp / (train.segments * config.model.num_layers)
        sends = 2 * layout.virtual_stages * micro_batches if layout.pp > 1 else 0
        parts = layout.tp if layout.sequence_parallel else 1
        seconds = (
            micro_batches * busiest,
            (waits + in_ring) * busiest,
            self._tensor_s(config, layout) * (micro_batches + waits),
            micro_batches * self._context_s(config, layout),
            sends
            * stream_bytes(config)
            / layout.cp
            / parts
            / self._bandwidth(layout.num_ranks, rings=self.device.per_node),
            self._data_s(config, layout, micro_batches),
            self._update_s(config, layout),
        )
        return Estimate(
            dict(zip(PARTS, seconds, strict=True)),
            tokens=train.global_batch_tokens,
            model_flops=self.model_flops * train.global_batch_tokens,
            ranks=layout.num_ranks,
            peak_flops=self.device.peak_flops,
            steps=train.steps,
        )

    def assumptions(self, *, compared: bool = False) -> list[str]:
        """List the assumptions of the estimate; `compared` if blocks are compared with those of a Transformer."""
        config, device = self.holdings.config, self.device
        on_cpu = device.name == "cpu"
        lines = [f"large products reach {self.rate / device.peak_flops:.0%} of the peak"]
        for mixer in chain.from_iterable(map(memory_parts, config.model.mixers.values())):
            kind = memory_kind(mixer)
            if is_fused(config, mixer) and on_cpu:
                lines.append(f"one operation runs all chunks of memories, at {FUSED_RATE[kind]:.0%} of that")
            elif is_fused(config, mixer):
                what = "sequence" if mixer.reset_every is None else "piece between resets"
                at_once = programs_at_once(device, instructions(config, mixer).warps)
                lines.append(f"a head of a {what} is one program, and {at_once} run at a time, which issue")
                lines[-1] += f" {READY:g} instructions a cycle and scheduler, of those counted in the machine code,"
                lines[-1] += " and wait for no bandwidth"
                if kernel_products(config.train) == "tf32":
                    lines.append("products of tf32 count as those of tf32x3, which take more instructions")
                if device.name not in COUNTED_ON:
                    lines.append("counts are those of the machine code for sm_90; another GPU's may differ")
            elif kind is not None:
                lines.append(f"products of memories reach {MIXING_RATE[kind]:.0%} of that, as on a CPU")
                if self._calls_s(mixer):
                    calls, least = CALLS_PER_CHUNK[kind], 1e6 * device.call_s
                    lines.append(f"a chunk is {calls:,} calls, one after the other, of {least:.0f} us at least")
            if not on_cpu and (pieces := CALLS_NOT_COUNTED.get(getattr(mixer, "composition", mixer.kind))):
                lines.append(f"calls of {pieces}, one after the other, are not counted")
        lines = list(dict.fromkeys(lines))
        if not on_cpu:
            if whose := "the Transformer" if compared else "attention" if attention_mixers(config.model) else "":
                lines.append(f"{whose}'s rotary positions are torch's, which are not fused")
            lines.append("norms, gates and streams around products move the bytes counted, at 90% of the bandwidth")
            node = f"{device.link / 1e9:.0f} GB/s within a node of {device.per_node}"
            beyond = f"{device.network / 1e9:.0f} beyond by an adapter of its own"
            lines.append(f"a device sends {node}, {beyond}; nothing is sent while it computes")
            lines.append("a ring enters a node once, by the adapters of all its members there")
        return lines

    def _stage_s(self, config: RunConfig, layout: Layout, stage: int) -> float:
        """Return the seconds of a micro batch's forward and backward on a stage."""
        model, train, slices = config.model, config.train, self.holdings.slices(layout, stage)
        tokens = train.seq_len / layout.cp * train.micro_batch_size
        pattern = block_pattern(model)
        numbers = Counter(pattern[number] for blocks in slices for number in blocks)
        seconds = sum(self._block_s(config, layout, model.mixers[name]) * blocks for name, blocks in numbers.items())
        if slices[-1].stop == model.num_layers:
            head = self._total(product(1, model.d_model, padded_vocab_size(model)), config) / layout.tp
            seconds += head * tokens / self.rate
        return seconds

    def _block_s(self, config: RunConfig, layout: Layout, mixer: MixerConfig, flops: Flops | None = None) -> float:
        """Return the seconds of a micro batch's forward and backward through a block; `flops` counts its operations."""
        flops = flops or self._flops
        tokens = config.train.seq_len / layout.cp * config.train.micro_batch_size
        how = effective_recompute(config, mixer)
        parts = flops(mixer, how)
        maps = parts["maps"]
        if isinstance(mixer, TitansConfig) and mixer.composition == "mac":  # the whole mixer runs again
            maps = maps.times(1 + chunks_rerun(config, layout, mixer))
        seconds = self._total(maps + parts["levels"], config) / layout.tp * tokens / self.rate
        if self.device.name != "cpu":
            seconds += between_products_seconds(config, layout, mixer, self.device)
        for part in memory_parts(mixer):
            total = self._total(flops(part, how)["mixing"], config) * tokens / layout.tp
            seconds += self._mixing_s(config, layout, part, total) * (1 + chunks_rerun(config, layout, part))
        return seconds

    def beside_transformer(self, config: RunConfig, layout: Layout) -> float | None:
        """Return a block's speed in parts of that of the equal Transformer's, at this micro batch; None for one."""
        if all(isinstance(mixer, AttentionConfig) for mixer, _ in mixer_counts(config.model)):
            return None
        return self.transformer_block_s(config, layout) / self.mean_block_s(config, layout)

    def mean_block_s(self, config: RunConfig, layout: Layout) -> float:
        """Return the seconds of a micro batch's forward and backward through a block, on average where they differ."""
        counts = mixer_counts(config.model)
        return sum(self._block_s(config, layout, mixer) * blocks for mixer, blocks in counts) / config.model.num_layers

    def transformer_block_s(self, config: RunConfig, layout: Layout) -> float:
        """Return the same seconds of a block of the equal Transformer, under the same assumptions."""
        other = replace(config, model=equal_transformer(config.model))
        (mixer,) = other.model.mixers.values()
        return self._block_s(other, layout, mixer, partial(self._flops_of_block, other.model))

    @staticmethod
    def _total(cost: OpCost, config: RunConfig) -> float:
        """Return all operations of a token: pieces of sequences but the last run forward once more."""
        return cost.total + run_again(config) * cost.forward

    def _flops_of_block(self, model: ModelConfig, mixer: MixerConfig, recompute: str) -> dict[str, OpCost]:
        return block_flops(model, mixer, self.holdings.config.train.seq_len, recompute=recompute)

    def _mixing_s(self, config: RunConfig, layout: Layout, mixer: MixerConfig, flops: float) -> float:
        """Return the seconds of a micro batch's `flops` between the maps of a block, of memories without a far one."""
        kind = memory_kind(mixer)
        if is_fused(config, mixer) and self.device.name != "cpu":
            again = effective_recompute(config, mixer) in ("memory", "block")
            return memory_seconds(config, layout, mixer, kind, self.device, again=again)
        if is_fused(config, mixer):
            return flops / (self.rate * FUSED_RATE[kind])
        rate = 1.0 if kind is None else MIXING_RATE[kind]
        return max(flops / (self.rate * rate), self._calls_s(mixer) / layout.cp)

    def _calls_s(self, mixer: MixerConfig) -> float:
        """Return the least seconds of a mixer's chunk loop: calls of operations, one after the other."""
        if not has_chunk_loop(mixer):
            return 0.0
        seq_len = self.holdings.config.train.seq_len
        chunks = min(seq_len, mixer.reset_every or seq_len) / projection_chunk_size(mixer)
        return chunks * CALLS_PER_CHUNK[memory_kind(mixer)] * self.device.call_s

    def _bandwidth(self, span: int, rings: int = 1) -> float:
        """Return a device's bytes per second in a ring that spans so many ranks in a row, beside others alike.

        Beyond a node a ring enters and leaves each node once, by all adapters of its members there; `rings` share a
        node's, as many as there are groups on it.
        """
        device = self.device
        if span <= device.per_node:
            return device.link
        return min(device.link, device.network * max(1, device.per_node // rings))

    def _tensor_s(self, config: RunConfig, layout: Layout) -> float:
        """Return the seconds of a micro batch's sums over tensor-parallel ranks, each a ring there and back."""
        model = config.model
        sums = 2 if model.cms.variant == "independent" else 1 + len(model.cms.levels)
        passes = (3 if config.train.recompute == "block" else 2) + run_again(config)
        volume = model.num_layers / layout.pp * sums * passes * 2 * (layout.tp - 1) / layout.tp * stream_bytes(config)
        return volume / layout.cp / self._bandwidth(layout.tp)

    def _context_s(self, config: RunConfig, layout: Layout) -> float:
        """Return the seconds in which a rank hands on states of a micro batch, and gradients back."""
        if layout.cp == 1:
            return 0.0
        sent = handed_on(config, layout, list(range(config.model.num_layers))) / layout.pp
        return sent / self._bandwidth(layout.tp * layout.cp, rings=layout.tp)

    def _data_s(self, config: RunConfig, layout: Layout, micro_batches: int) -> float:
        """Return the seconds of the exchange between replicas, averaged over cadences.

        Sums with a lag travel beside the steps after them.
        """
        dp, zero, holding = layout.replicas, config.parallel.stage, self.holdings.of_stage(layout, 0)
        due = {kind: count * self._updates_per_step(kind.level) for kind, count in holding.entries.items()}
        gradients = weights = FP32 * holding.total() * micro_batches
        if zero < 2:
            gradients = sum(self._sum_bytes(kind) * count for kind, count in due.items())
            weights = sum(self._total_bytes(kind) * count for kind, count in due.items())
        if zero == 3:
            weights = 2 * micro_batches * holding.weight_bytes()
        elif zero or any(kind.rule != "adamw" for kind in due):
            weights = sum(kind.itemsize * count for kind, count in due.items())
        if inside := layout.node_replicas:
            between = (gradients + weights) / inside * (1 - 1 / layout.nodes)
            passes = micro_batches if layout.flushes else 1
            summed = sum(n * (passes if kind.rule == "adamw" else 1) for kind, n in holding.entries.items())
            gathered = weights
            if config.parallel.shares_weights:
                gathered = 2 * micro_batches * holding.weight_bytes()
            within = (FP32 * summed + gathered) * (1 - 1 / inside)
            rings = layout.tp * inside
            return within / self._bandwidth(rings) + between / self._bandwidth(layout.tp * dp, rings=rings)
        return (gradients + weights) * (dp - 1) / dp / self._bandwidth(layout.tp * dp, rings=layout.tp)

    def _sum_bytes(self, kind: Kind) -> float:
        """Return the bytes of an entry of a sum that a step waits for."""
        if kind.level is None:
            return FP32
        level = self.holdings.config.model.cms.levels[kind.level]
        return 0 if level.lag else wire_bytes(WIRE_BLOCK, level.wire) / WIRE_BLOCK

    def _total_bytes(self, kind: Kind) -> float:
        """Return the bytes of an entry of a total at `zero=0` that a step waits for: it comes apart where rounded."""
        level = None if kind.level is None else self.holdings.config.model.cms.levels[kind.level]
        return 0 if level is not None and level.lag and level.wire == "fp32" else FP32

    def _updates_per_step(self, level: str | None) -> float:
        levels = self.holdings.config.model.cms.levels
        return 1.0 if level is None else 1 / levels[level].update_every_steps

    def _update_s(self, config: RunConfig, layout: Layout) -> float:
        """Return the seconds of updates, averaged over cadences: the rules' products, and memory read and written."""
        holding, divided = self.holdings.of_stage(layout, 0), 0.0
        for kind, count in holding.entries.items():
            each = FP32 * (UPDATE_PASSES * count + 2 * holding.state[kind])
            replicas = layout.replicas if config.parallel.stage or kind.rule != "adamw" else 1
            divided += each / replicas * self._updates_per_step(kind.level)
        products = self._rule_flops(Layout(tp=layout.tp, pp=layout.pp))
        return divided / self.device.bandwidth + products / layout.replicas / self.rate

    def _flops_of_rules(self, layout: Layout) -> float:
        holdings, optim = self.holdings, self.holdings.config.optim
        return sum(
            update_flops(holdings.rule_of(p), p.shape, optim, p.parts) * self._updates_per_step(p.level)
            for p in holdings.matrices(layout, 0)
        )


def memory_kind(mixer: MixerConfig) -> str | None:
    """Return the kind that decides the speed of memories: `mlp` or `linear` if they make writes, else `static`."""
    if not isinstance(mixer, SelfModifyingConfig):
        return None
    return mixer.memory if mixer.adaptive or mixer.query == "memory" else "static"
