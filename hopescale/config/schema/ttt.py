"""The mixers of test-time training, TTT-Linear and TTT-MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hopescale.config.schema.mixers import MixerConfig
from hopescale.config.schema.ranges import Count, Positive


@dataclass(frozen=True)
class TttConfig(MixerConfig):
    """Test-time training (arXiv 2407.04620): memories with a layer norm and a residual inside their loss."""

    kind: Literal["ttt"] = "ttt"
    """Kind of the mixer."""
    memory: Literal["mlp", "linear"] = "linear"
    """`linear`: `f(z) = z W + b` (TTT-Linear). `mlp`: `f(z) = gelu(z W1 + b1) W2 + b2` (TTT-MLP). Both answer
    `z + LN(f(z))`."""
    memory_dim: Count | None = None
    """Hidden width of an MLP memory; null is four times the head dim. Only with `memory: mlp`."""
    rate: Positive = 1.0
    """Base of the inner learning rate, which is divided by the head dim: 1 for TTT-Linear, 0.1 for TTT-MLP."""
    chunk_size: Count = 16
    """Tokens of a mini-batch, whose gradients are all taken at the weights with which it began. Rotary positions are
    counted in it."""
    conv_width: Count | None = 4
    """Tokens seen by the causal depthwise convolutions with a bias, in which keys and queries of one shared projection
    differ (the paper's Mamba backbone); null gives each a projection of its own (its Transformer backbone)."""
    gate: bool = True
    """Whether the output is multiplied by a GELU gate of the layer's input (the Mamba backbone)."""
