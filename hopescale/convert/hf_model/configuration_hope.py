"""Configuration of an exported Hope, Hope-Attention or Transformer."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class HopeConfig(PretrainedConfig):
    """The contents of `config.json` of an export.

    Args:
        hope: The model as hopescale describes it, every key of its `model` section.
        **kwargs: What every model of transformers has.
    """

    model_type = "hope"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers appends a list

    def __init__(self, hope: dict[str, Any] | None = None, **kwargs: Any):
        self.hope = hope or {}
        for name, key in (
            ("vocab_size", "vocab_size"),
            ("hidden_size", "d_model"),
            ("num_hidden_layers", "num_layers"),
            ("num_attention_heads", "num_heads"),
        ):
            kwargs.setdefault(name, self.hope.get(key))
        kwargs.setdefault("tie_word_embeddings", self.hope.get("tie_embeddings", True))
        super().__init__(**kwargs)
