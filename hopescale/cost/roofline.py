"""How long a block takes on a GPU, from counts: programs, waves, executed instructions, bytes. Imports no torch.

Instructions were counted in the machine code for sm_90, by loops and how often each runs; bytes by running a block on a
device without memory (docs/performance.md). What is guessed is how many instructions a cycle finds ready.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from hopescale.config.execution import kernel_products, run_again
from hopescale.config.layout import Layout
from hopescale.config.model_shape import head_dim, levels_of_block, memory_dim, num_pieces
from hopescale.config.schema import (
    AttentionConfig,
    CmsConfig,
    LevelConfig,
    MixerConfig,
    ModelConfig,
    RunConfig,
    SelfModifyingConfig,
)
from hopescale.cost.hardware import Device
from hopescale.cost.parameter import itemsize
from hopescale.cost.params import count_params

WARPS, SCHEDULERS = 8, 4
"""Warps that the registers of a multiprocessor hold, at 255 of a thread, and from how many it can issue in a cycle."""
READY = 0.45
"""Instructions that a scheduler issues a cycle, with two warps each and a barrier every 30 to 50; a guess, 0.3 to 0.6.
A warp issues half as many, whether its multiprocessor has work for others or not."""
KERNEL_CHUNK = 64
"""Tokens of the chunks that were counted."""
COUNTED_ON = ("H100", "H200")
"""Devices that run the machine code in which instructions were counted, that for sm_90."""


class Instructions(NamedTuple):
    """Warp instructions of a chunk that a program's warp executes, and how many warps a program has.

    The backward holds the replay of three chunks of four, as three quarters of the forward.
    """

    forward: int
    backward: int
    warps: int = 8


INSTRUCTIONS: dict[tuple[str, str, int], Instructions] = {
    ("tf32x3", "linear", 64): Instructions(64_054, 250_397),
    ("tf32x3", "mlp", 64): Instructions(174_066, 633_711),
    ("tf32x3", "linear", 128): Instructions(126_750, 500_621),
    ("tf32x3", "mlp", 128): Instructions(332_974, 1_274_002),
    ("bf16", "linear", 64): Instructions(11_426, 51_076, warps=4),
    ("bf16", "mlp", 64): Instructions(43_145, 166_234, warps=4),
    ("bf16", "linear", 128): Instructions(18_296, 74_676),
    ("bf16", "mlp", 128): Instructions(60_733, 213_001),
}
"""By the products of five memories, their kind and width.

Those of `tf32x3` are of kernels that ran chunks in pieces of 32. MLPs with `bf16` normalise their writes. A narrower
memory counts as 64 wide, and `tf32` as `tf32x3`, of which it is less."""
MEMORIES = 5
"""Memories in these counts."""
PASSES = 70
"""Reads and writes of the residual stream's size between the maps of a mixer that is no self-modifying one, forward and
backward: those of attention's rotary positions in torch's operations, as counted. One kernel would take about 14."""
MEMORY_BANDWIDTH = 0.9
"""Part of the memory's bandwidth that elementwise operations reach."""


def memory_seconds(
    config: RunConfig, layout: Layout, mixer: SelfModifyingConfig, kind: str, device: Device, *, again: bool = False
) -> float:
    """Return the seconds of a micro batch's forward and backward through the kernels of a block's memories.

    Args:
        config, layout: Micro batch and tensor-parallel ranks.
        mixer: Memories without a far one.
        kind: `mlp`, `linear` or `static`.
        device: GPU.
        again: Whether the backward pass runs the forward once more.
    """
    model, train = config.model, config.train
    # Pieces of sequences that are cut follow one another; those between resets run side by side.
    seq_len = train.seq_len // (layout.cp * train.segments)
    pieces = num_pieces(mixer, seq_len)
    programs = model.num_heads / layout.tp * train.micro_batch_size * pieces
    counted = instructions(config, mixer)
    executed: float = counted.forward * (1 + again + run_again(config)) + counted.backward
    if kind == "static":
        executed /= MEMORIES
    tokens = train.segments * seq_len / pieces
    issued = executed * WARPS / SCHEDULERS / KERNEL_CHUNK * tokens
    return waves(programs, device, counted.warps) * issued / READY / device.clock


def instructions(config: RunConfig, mixer: SelfModifyingConfig) -> Instructions:
    """Return what was counted of the kernels of a mixer's memories."""
    products = "bf16" if kernel_products(config.train) == "bf16" else "tf32x3"
    width = max(head_dim(config.model), memory_dim(config.model, mixer) or 0)
    return INSTRUCTIONS[products, mixer.memory, 64 if width <= 64 else 128]


def equal_transformer(model: ModelConfig) -> ModelConfig:
    """Return the Transformer of a model's width, depth and heads, with nearly as many parameters in its blocks."""
    counts = count_params(model)
    each = (counts["mixers"] + counts["levels"]) / model.num_layers
    d_ff = max(64, round((each - 4 * model.d_model**2) / (3 * model.d_model) / 64) * 64)
    levels = CmsConfig(levels={"mlp": LevelConfig(d_ff=d_ff)})
    return replace(model, mixers={"attention": AttentionConfig()}, pattern=(), cms=levels)


def waves(programs: float, device: Device, warps: int) -> int:
    """Return how often the multiprocessors fill with programs of some warps."""
    return math.ceil(programs / programs_at_once(device, warps))


def programs_at_once(device: Device, warps: int) -> int:
    """Return how many programs of some warps run at a time: their registers decide."""
    return device.units * (WARPS // warps)


def between_products_bytes(model: ModelConfig, mixer: MixerConfig, precision: str, tp: int = 1) -> float:
    """Return the bytes of a token that a block reads and writes around its products and memories, forward and backward.

    Counted are norms, additions to the stream, levels' gates, and what kernels of `ops.fused` do around memories.
    """
    size, stream = itemsize(precision), model.d_model
    levels = [level.d_ff / tp for level in levels_of_block(model, 0).values()]
    # Nothing is added before a block's first norm; after its last level something is.
    norms = size * stream * (8 * (1 + len(levels)) - 2 + 3)
    gates = 8 * size * sum(levels)
    if not isinstance(mixer, SelfModifyingConfig):
        return norms + gates + PASSES * size * stream / tp
    inner = model.num_heads * head_dim(model) / tp
    streams, answers = 24 + (9 + 2 * mixer.gate) * size, 12 + (2 + 3 * mixer.gate) * size
    return norms + gates + inner * (streams + answers)


def between_products_seconds(config: RunConfig, layout: Layout, mixer: MixerConfig, device: Device) -> float:
    """Return the seconds of a micro batch that a block spends on these bytes."""
    train = config.train
    each = between_products_bytes(config.model, mixer, train.precision, layout.tp)
    return each * train.seq_len / layout.cp * train.micro_batch_size / (MEMORY_BANDWIDTH * device.bandwidth)
