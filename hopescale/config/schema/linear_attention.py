"""Mixers with a linear memory per head, each a set of values of one config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hopescale.config.schema.mixers import MixerConfig
from hopescale.config.schema.ranges import Count, Positive


@dataclass(frozen=True)
class LinearAttentionConfig(MixerConfig):
    """A linear memory per head: linear attention, RetNet, DeltaNet, Gated DeltaNet, Mamba-2. The defaults are Gated
    DeltaNet's; `docs/models.md` has the others' values."""

    kind: Literal["linear_attention"] = "linear_attention"
    """Kind of the mixer."""
    num_heads: Count | None = None
    """Heads of the mixer, each with a memory; null is `model.num_heads`."""
    key_dim: Count | None = None
    """Width of a head's keys and queries (Mamba-2: the state size); null is the model's head dim."""
    value_dim: Count | None = None
    """Width of a head's values and answers; null is the model's head dim."""
    key_groups: Count | None = None
    """Groups of heads that share keys and queries (Mamba-2: the groups of B and C); null gives each head its own.
    Divides `num_heads`, and `parallel.tp` divides it."""
    conv_width: Count | None = 4
    """Tokens seen by the causal depthwise convolution on queries, keys and values, with SiLU; null is neither."""
    conv_bias: bool = False
    """Whether the convolution has a bias. Only with `conv_width`."""
    key_norm: Literal["none", "l2"] = "l2"
    """`l2`: keys and queries are scaled to unit length."""
    query_scale: bool = True
    """Whether queries are divided by the root of `key_dim`."""
    rotary: bool = False
    """Whether keys and queries are rotated by their positions (base 10,000). Needs an even `key_dim`."""
    decay: Literal["none", "fixed", "input"] = "input"
    """What a memory keeps per token. `none`: all. `fixed`: `1 - 2^(-5 - h)` in head `h`, counted from 0 (RetNet).
    `input`: `exp(-A Delta)`, with the head's learned rate `A` and `Delta = softplus(dt + dt_bias)` of the token."""
    write: Literal["one", "sigmoid", "step"] = "sigmoid"
    """Factor on what a token writes. `one`: 1. `sigmoid`: a sigmoid of the token's input (the `beta` of DeltaNet).
    `step`: `Delta` itself (Mamba-2); needs `decay: input`."""
    erase: bool = True
    """Whether a write first takes out what its key held (the delta rule). Not with `write: step`, which may exceed 1;
    needs keys of unit length."""
    skip: bool = False
    """Whether each value is added to its answer, times a learned number per head (the `D` of Mamba-2)."""
    output_gate: Literal["none", "after_norm", "before_norm"] = "after_norm"
    """Where answers are multiplied by a SiLU gate of the layer's input: `norm(y) * silu(z)`, as in RetNet and Gated
    DeltaNet, or `norm(y * silu(z))`, as in Mamba-2."""
    norm: Literal["head", "group"] = "head"
    """What the RMSNorm of answers spans: each head, or all heads of a key group (Mamba-2; with one group this is the
    whole width)."""
    norm_weight: Literal["none", "shared", "own"] = "shared"
    """Weights of that norm: none (RetNet), one per channel of a head for all heads, or one per channel of each head.
    `shared` needs `norm: head`."""
    a_min: Positive = 1.0
    """Smallest rate `A` at initialisation; rates are drawn evenly from `a_min` to `a_max`. Only with `decay: input`."""
    a_max: Positive = 16.0
    """Largest rate `A` at initialisation. Only with `decay: input`."""
    step_min: Positive = 0.001
    """Smallest `Delta` at initialisation; its log is drawn evenly between those of `step_min` and `step_max`. Only
    with `decay: input`."""
    step_max: Positive = 0.1
    """Largest `Delta` at initialisation. Only with `decay: input`."""
    chunk_size: Count = 64
    """Tokens that are computed at once. Changes speed and rounding only."""
