"""Device memory of each rank, by what takes it. Imports no torch.

The most a rank holds is the largest of a few moments of a step; docs/planning.md derives them.
"""

from __future__ import annotations

from dataclasses import dataclass

from hopescale.config.execution import effective_recompute
from hopescale.config.layout import Layout
from hopescale.config.model_shape import padded_vocab_size
from hopescale.config.plan import make_plan
from hopescale.config.schema import RunConfig
from hopescale.cost.activations import FP32, BatchSizes, block_activations, head_bytes, logits_bytes
from hopescale.cost.holdings import Holding, Holdings, gathers

KINDS = (
    "weights",
    "gradients",
    "accumulators",
    "masters",
    "optimizer",
    "memory states",
    "activations",
    "in flight",
    "logits",
    "workspace",
)
"""What takes memory, from what lasts longest. `accumulators` are the gradient sums of slow levels, `in flight` what
further micro batches of a pipeline have left, `workspace` what the moment itself computes with."""

PACK_BYTES = 1 << 26
"""Most bytes of gradients that are sent at once, if no tensor is larger."""
MATRIX_WORKSPACE = 6
"""Copies of a matrix that a rule for matrices computes with."""


@dataclass(frozen=True)
class DeviceMemory:
    """The most that a rank of a stage holds.

    Attributes:
        bytes: By kind, at that moment.
        moment: `loss`, `backward`, `last block` (the first block's backward) or `update`.
        in_flight: Micro batches whose activations the rank holds at a time.
        parameters: Entries of its weights.
    """

    bytes: dict[str, float]
    moment: str
    in_flight: int
    parameters: int

    @property
    def peak(self) -> float:
        """Bytes in all."""
        return sum(self.bytes.values())


def device_memory_of_stage(
    holdings: Holdings, config: RunConfig, layout: Layout, stage: int, *, exact: bool = True
) -> DeviceMemory:
    """Return the most that a rank of a pipeline stage holds.

    Args:
        holdings: Of the config's model and optimizer.
        config: Micro batch, precision and recomputation, which may differ from those `holdings` was made with.
        layout: How ranks are distributed.
        stage: Pipeline rank.
        exact: Whether shares of matrices are those of the replica that owns most, or of all on average.
    """
    holding = holdings.of_stage(layout, stage)
    owned = holdings.owned_share(layout, stage) if exact else 1 / layout.dp
    lasting = _lasting(config, layout, holding, owned)
    passing = _Passing(config, layout, holdings.slices(layout, stage), stage, holding)
    fast = _fast_gradients(config, layout, holding)
    several = passing.micro_batches > 1
    moments = {
        "loss": passing.loss() | {"gradients": fast * several},
        "backward": passing.backward(several) | {"gradients": fast * several},
        "last block": passing.last_block() | {"gradients": fast},
        "update": {"gradients": fast, "workspace": _update_workspace(config, layout, holding, owned)},
    }
    totals = {name: sum(moment.values()) for name, moment in moments.items()}
    name = max(totals, key=totals.get)
    at_peak = {kind: lasting.get(kind, 0) + moments[name].get(kind, 0) for kind in KINDS}
    return DeviceMemory(at_peak, name, passing.in_flight, holding.total())


def device_memory_of_stages(
    holdings: Holdings, config: RunConfig, layout: Layout, *, exact: bool = True
) -> list[DeviceMemory]:
    """Return what the ranks of each pipeline stage hold."""
    return [device_memory_of_stage(holdings, config, layout, stage, exact=exact) for stage in range(layout.pp)]


def _lasting(config: RunConfig, layout: Layout, holding: Holding, owned: float) -> dict[str, float]:
    """Count what a rank holds all the time, after what replicas share out."""
    zero, dp, joined = config.parallel.zero, layout.dp, gathers(config, layout)
    found = dict.fromkeys(("weights", "gradients", "accumulators", "masters", "optimizer"), 0.0)
    for kind, entries in holding.entries.items():
        matrix, bytes_ = kind.rule != "adamw", FP32 * entries
        share = owned if matrix else 1 / dp if zero else 1.0
        found["weights"] += kind.itemsize * entries / (dp if zero == 3 else 1)
        found["optimizer"] += FP32 * holding.state[kind] * share
        own_master = kind.itemsize < FP32 or (not matrix and zero in (1, 2)) or (matrix and joined)
        found["masters"] += bytes_ * share * own_master
        if kind.level is not None and config.model.cms.levels[kind.level].update_every_steps > 1:
            found["accumulators"] += bytes_ / (dp if zero > 1 else 1) + FP32 * holding.grams[kind]
        elif matrix:
            found["gradients"] += bytes_ + FP32 * holding.grams[kind]
    return found


def _fast_gradients(config: RunConfig, layout: Layout, holding: Holding) -> float:
    """Count the gradient sums that are made anew at each step: those of AdamW's parameters of period 1."""
    entries = sum(
        count
        for kind, count in holding.entries.items()
        if kind.rule == "adamw" and (kind.level is None or config.model.cms.levels[kind.level].update_every_steps == 1)
    )
    return FP32 * entries / (layout.dp if config.parallel.zero > 1 else 1)


def _update_workspace(config: RunConfig, layout: Layout, holding: Holding, owned: float) -> float:
    """Count what an update of everything computes with: scaled gradients, roots, and weights before, to compare."""
    zero, dp = config.parallel.zero, layout.dp
    elementwise = sum(count for kind, count in holding.entries.items() if kind.rule == "adamw")
    in_levels = sum(count * (1 / dp if zero else 1) for kind, count in holding.entries.items() if kind.level)
    matrices = holding.total() - elementwise
    workspace = 2 * elementwise / (dp if zero else 1) + in_levels
    if matrices:
        workspace += MATRIX_WORKSPACE * min(holding.largest, matrices)
    pack = min(max(PACK_BYTES, FP32 * holding.largest), FP32 * holding.total()) if dp > 1 else 0
    return max(FP32 * workspace, pack)


class _Passing:
    """What comes and goes with micro batches."""

    def __init__(self, config: RunConfig, layout: Layout, slices: list[range], stage: int, holding: Holding):
        model = config.model
        self.config, self.layout, self.holding = config, layout, holding
        self.micro_batches = make_plan(config, layout).grad_accumulation
        self.sizes = BatchSizes.of(config.train, layout)
        self.block = block_activations(model, self.sizes, effective_recompute(config))
        self.blocks = sum(map(len, slices)) / len(slices)
        self.is_last = slices[-1].stop == model.num_layers
        waiting = layout.pp - stage
        if layout.virtual_stages > 1:
            waiting = 2 * (layout.pp - stage - 1) + (layout.virtual_stages - 1) * layout.pp + 1
        self.in_flight = min(waiting, self.micro_batches * layout.virtual_stages)
        stream = self.sizes.tokens * model.d_model * self.sizes.itemsize * self.sizes.stream_share
        self.between = 2 * stream if layout.pp > 1 else 0.0
        rows = padded_vocab_size(model) / layout.tp * model.d_model
        self.held_gradient = rows * self.sizes.itemsize if model.tie_embeddings and self.is_last and stage == 0 else 0.0

    def _kept(self) -> dict[str, float]:
        one = self.blocks * self.block.kept + self.between
        states = self.blocks * self.block.states
        return {"activations": one, "memory states": states, "in flight": (self.in_flight - 1) * (one + states)}

    def loss(self) -> dict[str, float]:
        """Return what there is when the loss goes back through the logits."""
        kept = self._kept()
        if self.is_last:
            kept["activations"] += head_bytes(self.config.model, self.sizes)
            kept["logits"] = logits_bytes(self.config.model, self.sizes)
        return kept

    def backward(self, several: bool) -> dict[str, float]:
        """Return what there is in the backward of the last block here, with sums of gradients of others before it."""
        new = self.sizes.itemsize * self._largest_in_block() * several
        workspace = self.block.again + self.block.workspace + new + self.held_gradient + self._gathered()
        return self._kept() | {"workspace": workspace}

    def last_block(self) -> dict[str, float]:
        """Return what there is when the first block here goes back, and all gradients are made."""
        workspace = self.block.again + self.block.workspace + self.held_gradient + self._gathered()
        return {"activations": self.block.kept, "memory states": self.block.states, "workspace": workspace}

    def _largest_in_block(self) -> float:
        model, tp = self.config.model, self.layout.tp
        widths = [3 * level.d_ff for level in model.cms.levels.values()] + [3 * model.d_model]
        return max(widths) * model.d_model / 3 / tp

    def _gathered(self) -> float:
        """Count what ZeRO 2 sends gradients in, and the weights that ZeRO 3 makes whole: two blocks, and the others."""
        zero = self.config.parallel.zero
        bucket = min(PACK_BYTES, FP32 * self.holding.total()) if zero > 1 else 0.0
        if zero != 3:
            return bucket
        per_block = self.holding.weight_bytes() / max(1, self.config.model.num_layers)
        rows = padded_vocab_size(self.config.model) * self.config.model.d_model
        return bucket + 2 * per_block + self.sizes.itemsize * rows
