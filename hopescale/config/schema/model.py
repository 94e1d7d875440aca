"""What the model is. Changing anything here changes the identity of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from hopescale.config.schema.mixers import MixerConfig, SelfModifyingConfig
from hopescale.config.schema.ranges import Count, CountOrZero, NumberRange, Positive


@dataclass(frozen=True)
class LevelConfig:
    """One level of the continuum memory system: a gated MLP with its own outer cadence."""

    d_ff: Count = 1024
    """Hidden width of the level's MLP. A positive count."""
    update_every_steps: Count = 1
    """Outer cadence: optimizer steps between two updates of this level, made with the sum of their gradients."""
    phase: CountOrZero = 0
    """Shift of the cadence: the level is due at steps `s` with `(s + phase) % update_every_steps == 0`."""
    rolling: bool = False
    """Whether the level's blocks take turns: of its `n` blocks, number `i` has the phase `phase + i * period / n`,
    rounded down, so that the level is never due in all of them at once. Needs a period and a number of blocks above
    1."""
    lag: CountOrZero = 0
    """Steps from the end of a period to the update with its sum, which replicas exchange meanwhile. Below
    `update_every_steps`."""
    wire: Literal["fp32", "bf16", "int8", "int4"] = "fp32"
    """Type in which each replica sends the level's sum, which they add up in float32. What it cannot hold stays in the
    accumulator for the next period. Needs a period above 1."""
    update_every_tokens: Count | None = None
    """In-context cadence: tokens between two steps that the level takes on the loss of a text which `hopescale adapt`
    reads without `--levels`; null is a level that stays as it is trained. Training does not look at it."""


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
class TransferConfig:
    """Learning rates of a narrower model for a wider one (muP); `docs/width_transfer.md` derives what changes."""

    base_width: Count = 256
    """`model.d_model` of the model on which `optim.lr` was tuned. Widths of levels are taken to have grown with it."""
    base_head_dim: Count | None = None
    """Its head dim; null is the present one: there are more heads, and none is wider. A set
    `memory_dim` of a mixer is taken to have stayed, one that is null to have grown with the head dim."""


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
    """Heads of every mixer."""
    head_dim: Count | None = None
    """Width of a head; null is `d_model / num_heads`."""
    mixers: dict[str, MixerConfig | None] = field(default_factory=lambda: {"hope": SelfModifyingConfig()})
    """What mixes tokens, by name; the first entry replaces the default, `null` removes one that a base recipe defines.
    `kind` says which keys an entry has; one that changes its kind starts from the defaults of the new one."""
    pattern: tuple[str, ...] = ()
    """Names of mixers for the blocks, from the first on, repeated to the last. Empty is the one mixer there is."""
    within_documents: bool = False
    """Whether tokens mix with those of their own document only, which begins with the end of text before it. Generation
    treats its context as one document."""
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
