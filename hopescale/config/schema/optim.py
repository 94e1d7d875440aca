"""How the weights change."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from hopescale.config.schema.ranges import (
    Count,
    CountOrZero,
    Fraction,
    FractionOrEnds,
    FractionOrZero,
    NumberRange,
    Positive,
    PositiveOrZero,
)


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate as a pure function of the step; `optim.lr` is its peak."""

    name: Literal["cosine", "wsd"] = "cosine"
    """`cosine`: warm-up, then half a cosine. `wsd`: warm-up, stable, then a linear decay."""
    warmup_steps: CountOrZero = 0
    """Steps of linear warm-up from 0. A run that is shorter ends within it."""
    min_lr_ratio: FractionOrEnds = 0.1
    """Last learning rate as a fraction of the peak."""
    decay_fraction: Annotated[float, NumberRange("(0, 1]")] = 0.2
    """Fraction of `train.steps` spent in the final decay. Only with `name: wsd`."""


Rule = Literal["adamw", "muon", "m3", "delta_momentum", "deep_momentum", "dgd"]
"""Names of the update rules; all but AdamW's update matrices."""


@dataclass(frozen=True)
class GroupConfig:
    """Parameters that share settings. Every parameter belongs to exactly one group."""

    rule: Rule = "adamw"
    """The update rule. All but `adamw` take matrices: parameters of two and more dimensions, of which the last two are
    a matrix; `dgd` those of linear layers alone. Embedding and head are better left to `adamw`."""

    match: tuple[str, ...] | None = None
    """Shell patterns of parameter names (`*.norm.weight`). Null takes all that no other group matches; exactly one
    group does so."""
    lr_scale: PositiveOrZero = 1.0
    """Factor on `optim.lr`."""
    weight_decay: PositiveOrZero | None = None
    """Decoupled weight decay per unit of learning rate; null is `optim.weight_decay`."""
    betas: Annotated[tuple[float, float], NumberRange("[0, 1)")] | None = None
    """Decay rates of AdamW's two moments; null is `optim.betas`. Only with `rule: adamw`."""


Orthogonalize = Literal["newton_schulz", "polar_express"]
"""Methods by which a matrix gets singular values near 1."""
Blocks = Literal["matrix", "projections", "heads"]
"""What of a fused projection is a matrix to an update rule."""


@dataclass(frozen=True)
class MuonConfig:
    """Muon: an orthogonalised momentum. One momentum per matrix."""

    momentum: FractionOrZero = 0.95
    """Decay rate of the momentum, per update."""
    nesterov: bool = True
    """Whether to look ahead along the newest gradient."""
    orthogonalize: Orthogonalize = "newton_schulz"
    """How a momentum is made orthogonal: `newton_schulz`, one quintic again and again, or `polar_express`, the best
    quintic of each step, on Gram matrices where that is cheaper."""
    ns_steps: Count | None = None
    """Iterations of that; null is 5 of `newton_schulz` and 4 of `polar_express`."""
    blocks: Blocks = "matrix"
    """What is made orthogonal of the in-projections that fuse several: `matrix` the whole, `projections` each
    projection by itself (queries, keys, ...), `heads` each head of each. The rule sees them as matrices."""
    ns_dtype: Literal["bf16", "fp32"] | None = None
    """Precision of these; null is `bf16` on CUDA and `fp32` elsewhere."""
    eps: Positive = 1e-7
    """Least Frobenius norm that a matrix is divided by."""
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original"
    """Factor on the learning rate by shape: `original` is `sqrt(max(1, rows / columns))`, `match_rms_adamw` is
    `0.2 sqrt(max(rows, columns))`, with which the learning rates of AdamW fit."""


@dataclass(frozen=True)
class M3Config:
    """M3: a fast and a slow momentum, both orthogonalised, over a second moment. Up to four moments per matrix."""

    beta1: Fraction = 0.95
    """Decay rate of the fast momentum per update; with `form: paper` the weight of a gradient in it."""
    beta2: Fraction = 0.95
    """The same of the second moment."""
    beta3: Fraction = 0.5
    """The same of the slow momentum, per period."""
    alpha_slow: PositiveOrZero = 0.5
    """Weight of the slow momentum's direction; 0 leaves the slow momentum out."""
    frequency: Count = 4
    """Period of the slow momentum, in updates of the parameter itself."""
    orthogonalize: Orthogonalize = "newton_schulz"
    """How a momentum is made orthogonal: `newton_schulz`, one quintic again and again, or `polar_express`, the best
    quintic of each step, on Gram matrices where that is cheaper."""
    ns_steps: Count | None = None
    """Iterations of that; null is 5 of `newton_schulz` and 4 of `polar_express`."""
    blocks: Blocks = "matrix"
    """What is made orthogonal of the in-projections that fuse several: `matrix` the whole, `projections` each
    projection by itself (queries, keys, ...), `heads` each head of each. The rule sees them as matrices."""
    ns_dtype: Literal["bf16", "fp32"] | None = None
    """Precision of these; null is `bf16` on CUDA and `fp32` elsewhere."""
    form: Literal["ema", "paper"] = "ema"
    """`ema`: moments are exponential averages. `paper`: Algorithm 1 to the letter, whose sums only grow."""
    second_moment: bool = True
    """Whether to divide by the root of the second moment."""
    eps: Positive = 1e-8
    """Added to that root."""
    nesterov: bool = False
    """Whether the fast momentum looks ahead. Only with `form: ema`."""
    update_rms: Positive | None = None
    """Root mean square of an update before the learning rate; null is 0.2, or no such scaling with `adjust_lr_fn`. Only
    with `form: ema`."""
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None
    """Muon's factor by shape in place of `update_rms`. Only with `form: ema`."""


@dataclass(frozen=True)
class DeltaMomentumConfig:
    """Delta Momentum: a momentum that forgets along the present gradient. One momentum per matrix, and with `beta2` a
    second moment."""

    momentum: FractionOrZero = 0.9
    """Decay rate of the momentum, per update."""
    delta: FractionOrEnds = 0.1
    """Strength of the erase along the gradient; 0 is plain momentum."""
    form: Literal["unit", "paper"] = "unit"
    """Whether the erase is divided by the gradient's squared norm (`unit`) or not (`paper`)."""
    beta2: Fraction | None = None
    """Decay rate of a second moment that preconditions what is written; null writes the gradient."""
    eps: Positive = 1e-8
    """Added to the root of the second moment. Only with `beta2`."""


@dataclass(frozen=True)
class DeepMomentumConfig:
    """Deep momentum: a memory per matrix that learns the gradient's rows."""

    alpha: FractionOrEnds = 0.9
    """Retention of the memory, per update."""
    inner_lr: Positive = 0.01
    """Inner learning rate, for a loss that is summed over rows."""
    objective: Literal["dot", "l2"] = "dot"
    """Inner loss: inner product or squared error."""
    memory: Literal["mlp", "linear"] = "mlp"
    """What the memory is: two layers and a residual, or one matrix."""
    memory_dim: Count | None = None
    """Hidden width of an MLP memory; null is 32. Only with `memory: mlp`."""
    update_rms: Positive | None = None
    """Root mean square of an update before the learning rate; null keeps the length of the gradient's rows."""


@dataclass(frozen=True)
class DgdConfig:
    """Delta gradient descent. No state."""

    target: Literal["surprise", "residual"] = "surprise"
    """What a layer is to answer its input with: minus the gradient of its output (`surprise`, as printed), or its
    present answer moved along that (`residual`), which does not decay what the weights hold."""


@dataclass(frozen=True)
class OptimConfig:
    """The outer optimizer."""

    lr: Positive = 4e-4
    """Peak learning rate."""
    betas: Annotated[tuple[float, float], NumberRange("[0, 1)")] = (0.9, 0.95)
    """Decay rates of AdamW's first and second moment."""
    eps: Positive = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: PositiveOrZero = 0.1
    """Decoupled weight decay per unit of learning rate."""
    grad_clip: Positive | None = 1.0
    """Largest global gradient norm; null is no limit. A level that is due counts with the mean over its period."""
    accumulate: Literal["sum", "mean"] = "sum"
    """What a level is updated with at the end of its period: the sum of the gradients since the last update, or their
    mean per step."""
    groups: dict[str, GroupConfig | None] = field(
        default_factory=lambda: {
            "no_decay": GroupConfig(
                match=(
                    "*norm.weight",
                    "*.mixer.norm.bias",
                    "*.mixer.gates.*",
                    "*.mixer.conv.*",
                    "*.mixer.memory.gates.*",
                    "*.mixer.memory.conv.*",
                    "*.mixer.qkv_proj.bias",
                    "*.cms.mix",
                ),
                weight_decay=0.0,
            ),
            "decay": GroupConfig(),
        }
    )
    """Parameter groups by name; `null` removes one. A parameter matched twice or not at all is an error."""
    muon: MuonConfig = field(default_factory=MuonConfig)
    """Settings of groups with `rule: muon`."""
    m3: M3Config = field(default_factory=M3Config)
    """Settings of groups with `rule: m3`."""
    delta_momentum: DeltaMomentumConfig = field(default_factory=DeltaMomentumConfig)
    """Settings of groups with `rule: delta_momentum`."""
    deep_momentum: DeepMomentumConfig = field(default_factory=DeepMomentumConfig)
    """Settings of groups with `rule: deep_momentum`."""
    dgd: DgdConfig = field(default_factory=DgdConfig)
    """Settings of groups with `rule: dgd`."""
    tp_mode: Literal["shard", "gather"] = "shard"
    """What a rule for matrices takes for a matrix under tensor parallelism: `shard` each rank's slice, `gather` the
    whole, which is updated on one of the ranks as it would be without them. Needs `parallel.tp` of 2 or more."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate over the run."""
