"""The kinds of mixers: a new one is added here, to `MixerConfig.kind`, and in `models/block.py` and `cost/mixers.py`."""

from __future__ import annotations

from hopescale.config.schema.linear_attention import LinearAttentionConfig
from hopescale.config.schema.mixers import AttentionConfig, MixerConfig, SelfModifyingConfig
from hopescale.config.schema.ttt import TttConfig

KINDS: dict[str, type[MixerConfig]] = {
    "self_modifying": SelfModifyingConfig,
    "attention": AttentionConfig,
    "linear_attention": LinearAttentionConfig,
    "ttt": TttConfig,
}
"""The classes of mixers by their kind."""
