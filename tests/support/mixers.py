"""Mixers of every kind as overrides of the recipe `debug`, for what is counted from a config alone."""

from __future__ import annotations

MIXERS: dict[str, list[str]] = {
    "hope": [],
    "linear": ["model.self_modifying.memory=linear"],
    "narrow memories": ["model.self_modifying.memory_dim=10"],
    "wide memories": ["model.self_modifying.memory_dim=40"],
    "plain gradient descent": ["model.self_modifying.inner_rule=gd"],
    "no momentum": ["model.self_modifying.momentum=false"],
    "boundary, dot": ["model.self_modifying={read: boundary, objective: dot}"],
    "titans": ["model.self_modifying={adaptive: [], targets: value, inner_rule: gd}"],
    "two banks": ["model.self_modifying={adaptive: [k, eta], query: memory, gate: true, projection_chunk_size: 32}"],
    "deltanet": [
        "model.self_modifying={memory: linear, adaptive: [], targets: value, objective: dot, momentum: false, "
        "retention: false, read: inclusive}"
    ],
    "attention": ["model.mixer=attention"],
    "grouped attention": ["model.mixer=attention", "model.attention={num_kv_heads: 1, qk_norm: true}"],
    "sliding window": ["model.mixer=attention", "model.attention={num_kv_heads: 1, window: 48}"],
}
