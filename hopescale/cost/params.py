"""Parameters of a model, counted from its config alone. Imports no torch; a test holds it to the real modules."""

from __future__ import annotations

from hopescale.config.plan import head_dim, kv_heads, levels_of_block, memory_dim, padded_vocab_size
from hopescale.config.schema import ModelConfig


def count_params(model: ModelConfig) -> dict[str, int]:
    """Count a model's parameters by part: embedding, head, mixers, levels, norms and their total.

    A tied head counts 0. Norms inside a mixer, over its heads, count with the mixer.
    """
    counts = {
        "embedding": padded_vocab_size(model) * model.d_model,
        "head": 0 if model.tie_embeddings else padded_vocab_size(model) * model.d_model,
        "mixers": model.num_layers * mixer_params(model),
        "levels": model.num_layers * level_params(model),
        "norms": model.num_layers * block_norm_params(model) + model.d_model,
    }
    return {**counts, "total": sum(counts.values())}


def mixer_params(model: ModelConfig) -> int:
    """Count one mixer."""
    return attention_params(model) if model.mixer == "attention" else self_modifying_params(model)


def level_params(model: ModelConfig) -> int:
    """Count the levels of one block, alike in all: gated MLPs without bias, and weights that mix independent ones."""
    levels = list(levels_of_block(model, 0).values())
    mix = len(levels) if model.cms.variant == "independent" else 0
    return sum(3 * model.d_model * level.d_ff for level in levels) + mix


def block_norm_params(model: ModelConfig) -> int:
    """Count the norms of one block: before the mixer, and before each level or all of them together."""
    num_level_norms = len(levels_of_block(model, 0)) if model.cms.variant == "sequential" else 1
    return (1 + num_level_norms) * model.d_model


def attention_params(model: ModelConfig) -> int:
    """Count the maps to queries, keys, values and back, their biases, and the two norms per head."""
    width, kv_width = model.num_heads * head_dim(model), kv_heads(model) * head_dim(model)
    maps = 2 * model.d_model * (width + kv_width)
    biases = width + 2 * kv_width if model.attention.qkv_bias else 0
    return maps + biases + (2 * head_dim(model) if model.attention.qk_norm else 0)


def self_modifying_params(model: ModelConfig) -> int:
    """Count one self-modifying mixer: maps in and out, convolution, memories, gates, output norm."""
    width = model.num_heads * head_dim(model)
    maps = model.d_model * width * (num_projections(model) + 1)
    conv = (num_projections(model) - model.self_modifying.gate) * width * (model.self_modifying.conv_width or 0)
    return maps + conv + model.num_heads * (_memories_per_head(model) + _gates_per_head(model)) + width


def num_projections(model: ModelConfig) -> int:
    """Count the slices of the in-projection: streams for keys, values and queries, and the output gate."""
    return 3 + model.self_modifying.gate


def wide_memories(model: ModelConfig) -> int:
    """Count the memories of a head whose output is a vector: `mem`, and those of k, v and q."""
    mixer = model.self_modifying
    return 1 + ("k" in mixer.adaptive) + ("v" in mixer.adaptive) + (mixer.query == "memory")


def gate_memories(model: ModelConfig) -> int:
    """Count the memories of a head whose output is one number: those of eta and alpha."""
    return sum(gate in model.self_modifying.adaptive for gate in ("eta", "alpha"))


def _memories_per_head(model: ModelConfig) -> int:
    wide, hidden = head_dim(model), memory_dim(model)
    if hidden is None:
        return wide_memories(model) * wide * wide + gate_memories(model) * wide
    return wide_memories(model) * 2 * hidden * wide + gate_memories(model) * (hidden * wide + hidden)


def _gates_per_head(model: ModelConfig) -> int:
    """Count the weights of static gates, and one bias for every gate."""
    mixer = model.self_modifying
    gates = ["eta"] + ["alpha"] * mixer.retention + ["mu"] * mixer.momentum
    static = [gate for gate in gates if gate not in mixer.adaptive]
    return len(static) * head_dim(model) + len(gates)
