"""Test-time training (arXiv 2407.04620): memories with a layer norm and a residual inside their loss."""

from hopescale.ops.ttt.chunked import ttt
from hopescale.ops.ttt.naive import ttt_naive
from hopescale.ops.ttt.types import TttMemory, TttState, TttStreams, TttWeights

__all__ = ["TttMemory", "TttState", "TttStreams", "TttWeights", "ttt", "ttt_naive"]
