"""Mixers by kind: what mixes tokens in a block. Changing anything here changes the identity of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from hopescale.config.schema.ranges import Count, Fraction, NumberRange, Positive


@dataclass(frozen=True)
class MixerConfig:
    """A mixer of any kind. Keys that kinds share by name have one type."""

    kind: Literal["self_modifying", "attention", "linear_attention", "titans", "ttt"] = "self_modifying"
    """What mixes tokens; the other keys of a mixer are those of its kind."""


@dataclass(frozen=True)
class FarMemoryConfig:
    """A further memory per head that never starts anew: the global memory of TNT (arXiv 2511.07343, Eq. 5 and 7).

    It is written with the streams of keys and values by plain gradient descent without momentum, and answers the stream
    of queries with the weights that its chunk began with. The answer is added to that of `mem`."""

    chunk_size: Count = 2048
    """Tokens of its chunks: all gradients of a chunk are taken at the weights with which it began. A multiple of the
    mixer's `chunk_size`."""
    eta_init: Fraction = 0.001
    """Its inner learning rate at initialisation, as a fraction of the mixer's `eta_max`, in (0, 1). The steps of a
    chunk add up: far above 2 divided by `chunk_size`, a key that comes back in each of its tokens overshoots."""
    alpha_init: Fraction = 0.9999
    """Its retention per token at initialisation, in (0, 1). 0.9999 keeps 81 % after 2,048 tokens."""


@dataclass(frozen=True)
class SelfModifyingConfig(MixerConfig):
    """Self-modifying Titans (NL Eq. 83-91): the mixer of Hope. `docs/concepts.md` explains the words."""

    kind: Literal["self_modifying"] = "self_modifying"
    """Kind of the mixer."""
    memory: Literal["mlp", "linear"] = "mlp"
    """`mlp`: `M(z) = z + W1 silu(W2 z)`. `linear`: `M(z) = W z`."""
    memory_dim: Count | None = None
    """Hidden width `E` of an MLP memory; null is the head dim. Only with `memory: mlp`."""
    adaptive: tuple[Literal["k", "v", "eta", "alpha"], ...] = ("k", "v", "eta", "alpha")
    """Projections that are memories and learn while they read; the others are static maps of the layer's input."""
    query: Literal["static", "memory"] = "static"
    """Whether queries come from a static map or from a memory of their own."""
    targets: Literal["self", "value"] = "self"
    """`self`: each memory makes its own target from the value, `M(v_t)` (Eq. 85). `value`: the target is `v_t` itself
    (Titans, TTT). `value` needs `adaptive: []` and `query: static`, since gates have another width than values."""
    objective: Literal["l2", "dot"] = "l2"
    """Inner loss: squared error between read and target, or minus their inner product."""
    inner_rule: Literal["dgd", "gd"] = "dgd"
    """`dgd`: a write first erases what its key held (Eq. 93). `gd`: plain gradient descent, no erase."""
    momentum: bool = True
    """Whether inner writes carry momentum `mu`, a static gate per head."""
    momentum_write: Literal["averaged", "whole"] = "averaged"
    """How much of a write enters the momentum. `averaged`: `1 - mu` of it, so that momentum spreads a write over time
    without making it larger. `whole`: all of it (Titans, Eq. 10), which adds up to `1 / (1 - mu)` writes. Only with
    `momentum`."""
    retention: bool = True
    """Whether memories forget (`alpha` gate). Off: alpha is 1 and `alpha` must not be in `adaptive`."""
    read: Literal["prefix", "inclusive", "boundary"] = "prefix"
    """State that token t reads: before its own write, after it, or at the start of its chunk."""
    chunk_size: Count = 64
    """Tokens between two boundaries of the main memory: its inner gradients are taken at the last boundary."""
    projection_chunk_size: Count | None = None
    """The same for the other memories. A multiple of `chunk_size`; null is `chunk_size`."""
    reset_every: Count | None = None
    """Tokens after which all memories, but not the convolution, start anew, counted from a sequence's or a document's
    first one; null is never. Then the pieces between run side by side (TNT, arXiv 2511.07343). A multiple of both
    chunk sizes."""
    far: FarMemoryConfig | None = None
    """A further memory with long chunks that never starts anew, for what lies before a reset; null is none."""
    eta_max: Annotated[float, NumberRange("(0, 2]")] = 1.0
    """Upper limit of the inner learning rate, in (0, 2]. Above 1 the transition may have negative eigenvalues."""
    eta_init: Fraction = 0.1
    """Inner learning rate of every token at initialisation, as a fraction of `eta_max`, in (0, 1)."""
    alpha_init: Fraction = 0.998
    """Retention per token at initialisation, in (0, 1). 0.998 keeps 88 % of a memory after 64 tokens."""
    mu_init: Fraction = 0.5
    """Inner momentum at initialisation, in (0, 1). Only with `momentum`."""
    error_cap: Positive | None = None
    """Largest norm of a token's error (read minus target) that may enter a write; null is no limit. Only with
    `objective: l2`."""
    normalize_writes: bool | None = None
    """Whether a write is divided by the square of what its layer amplifies an error by, where that is above 1
    (normalised least mean squares): memories then stay bounded at learning rates at which they explode otherwise. Null
    is true for MLP memories; false is the papers' equation. True only with `memory: mlp`."""
    conv_width: Count | None = 4
    """Tokens seen by the causal depthwise convolution on the projected inputs; null is no convolution."""
    gate: bool = False
    """Whether the output is multiplied by a SiLU gate of the layer's input."""


@dataclass(frozen=True)
class RopeScalingConfig:
    """Slower rotary frequencies, for contexts longer than those a model was first trained on."""

    kind: Literal["linear", "llama3"] = "llama3"
    """`linear`: all frequencies are divided by `factor`. `llama3`: only those that turn less than `low_freq_factor`
    times in the first context; those that turn more than `high_freq_factor` times stay, with a ramp between."""
    factor: Annotated[float, NumberRange("[1, inf)")] = 8.0
    """Divisor of the slowed frequencies."""
    low_freq_factor: Positive = 1.0
    """Turns in the first context up to which a frequency is slowed in full. Only with `kind: llama3`."""
    high_freq_factor: Positive = 4.0
    """Turns from which it is not slowed; above `low_freq_factor`. Only with `kind: llama3`."""
    first_context: Count = 8192
    """Tokens of the context that the model was first trained on. Only with `kind: llama3`."""


@dataclass(frozen=True)
class AttentionConfig(MixerConfig):
    """Causal softmax attention with rotary positions."""

    kind: Literal["attention"] = "attention"
    """Kind of the mixer."""
    num_kv_heads: Count | None = None
    """Heads of keys and values, each shared by `num_heads / num_kv_heads` heads of queries (grouped-query attention);
    null is `num_heads`. Divides `num_heads`."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias."""
    rope_theta: Annotated[float, NumberRange("(1, inf)")] = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: RopeScalingConfig | None = None
    """How the rotary frequencies are slowed for long contexts; null leaves them."""
    qk_norm: bool = False
    """Whether queries and keys pass an RMSNorm per head before rotation."""
    window: Count | None = None
    """Tokens that a token sees, itself included (sliding-window attention); null is all up to it. The cache then holds
    no more than these."""
