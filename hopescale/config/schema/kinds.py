"""The kinds of mixers. A new one is added here and in `MixerConfig.kind`, `models/block.py` and `cost/mixers.py`."""

from __future__ import annotations

from hopescale.config.schema.linear_attention import LinearAttentionConfig
from hopescale.config.schema.mixers import AttentionConfig, MixerConfig, SelfModifyingConfig
from hopescale.config.schema.titans import TitansConfig
from hopescale.config.schema.ttt import TttConfig

KINDS: dict[str, type[MixerConfig]] = {
    "self_modifying": SelfModifyingConfig,
    "attention": AttentionConfig,
    "linear_attention": LinearAttentionConfig,
    "titans": TitansConfig,
    "ttt": TttConfig,
}
"""The classes of mixers by their kind."""
