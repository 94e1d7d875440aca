"""What the model is. Changing anything here changes the identity of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from hopescale.config.schema.ranges import Count, CountOrZero, Fraction, NumberRange, Positive


@dataclass(frozen=True)
class LevelConfig:
    """One level of the continuum memory system: a gated MLP with its own outer cadence."""

    d_ff: Count = 1024
    """Hidden width of the level's MLP. A positive count."""
    update_every_steps: Count = 1
    """Outer cadence: optimizer steps between two updates of this level, made with the sum of their gradients."""
    phase: CountOrZero = 0
    """Shift of the cadence: the level is due at steps `s` with `(s + phase) % update_every_steps == 0`."""


@dataclass(frozen=True)
class CmsConfig:
    """The continuum memory system that follows every mixer (NL Eq. 70-74)."""

    variant: Literal["sequential", "independent"] = "sequential"
    """`sequential`: a pre-norm residual chain, fast to slow (Eq. 73). `independent`: one input, a learned weighted
    sum of the levels (Eq. 74)."""
    levels: dict[str, LevelConfig | None] = field(default_factory=dict)
    """Levels by name; `null` removes one that a base recipe defines. Sorted by period, never by order of writing."""
    placement: Literal["every_block", "depth"] = "every_block"
    """`every_block`: each block has all levels. `depth`: each block has one, the first blocks the fastest level, the
    last ones the slowest, evenly dealt out. `depth` needs levels of one width, and `parallel.pp` of 1."""


@dataclass(frozen=True)
class SelfModifyingConfig:
    """Self-modifying Titans (NL Eq. 83-91): the mixer of Hope. `docs/concepts.md` explains the words."""

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
    """Whether inner writes carry momentum `mu`, a static gate per head. A write enters by `1 - mu` of its size, so that
    momentum spreads it over time without making it larger."""
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
class AttentionConfig:
    """Causal softmax attention with rotary positions."""

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
    within_documents: bool = False
    """Whether a token sees only tokens of its own document. Generation treats its context as one document."""


@dataclass(frozen=True)
class TransferConfig:
    """Learning rates of a narrower model for a wider one (muP); `docs/width_transfer.md` derives what changes."""

    base_width: Count = 256
    """`model.d_model` of the model on which `optim.lr` was tuned. Widths of levels are taken to have grown with it."""
    base_head_dim: Count | None = None
    """Its head dim; null is the present one: there are more heads, and none is wider. A set
    `self_modifying.memory_dim` is taken to have stayed, one that is null to have grown with the head dim."""


@dataclass(frozen=True)
class ModelConfig:
    """A stack of blocks, each a mixer followed by a continuum memory system, between embedding and head."""

    vocab_size: Annotated[int, NumberRange("[2, inf)")] = 32_000
    """Entries of the vocabulary. Must equal the tokenizer's. Stored padded to a multiple of 128."""
    d_model: Count = 256
    """Width of the residual stream."""
    num_layers: Count = 4
    """Number of blocks."""
    num_heads: Count = 4
    """Heads of the mixer."""
    head_dim: Count | None = None
    """Width of a head; null is `d_model / num_heads`."""
    mixer: Literal["self_modifying", "attention"] = "self_modifying"
    """Which of the two blocks below mixes tokens; setting a key of the other one is an error."""
    self_modifying: SelfModifyingConfig = field(default_factory=SelfModifyingConfig)
    """Settings of the self-modifying mixer."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """Settings of the attention mixer."""
    cms: CmsConfig = field(default_factory=CmsConfig)
    """The levels that follow the mixer."""
    tie_embeddings: bool = True
    """Whether the head shares the embedding's matrix."""
    norm_eps: Positive = 1e-6
    """Added under the root of every RMSNorm."""
    init_std: Positive = 0.02
    """Standard deviation of the embedding and of an untied head. Other matrices follow their fan-in, as the
    `ParameterSpec` beside each says."""
    transfer: TransferConfig | None = None
    """The base at which learning rates were tuned: each class of parameters gets its rate, and logits their factor, by
    how much the model is wider. Null changes nothing; at the base width it changes nothing either."""
