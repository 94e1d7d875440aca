"""Mixers of every kind as overrides of the recipe `debug`, for what is counted from a config alone."""

from __future__ import annotations

MIXERS: dict[str, list[str]] = {
    "hope": [],
    "linear": ["model.mixers.hope.memory=linear"],
    "narrow memories": ["model.mixers.hope.memory_dim=10"],
    "wide memories": ["model.mixers.hope.memory_dim=40"],
    "plain gradient descent": ["model.mixers.hope.inner_rule=gd"],
    "no momentum": ["model.mixers.hope.momentum=false"],
    "boundary, dot": ["model.mixers.hope={read: boundary, objective: dot}"],
    "titans": ["model.mixers.hope={adaptive: [], targets: value, inner_rule: gd, momentum_write: whole}"],
    "two banks": ["model.mixers.hope={adaptive: [k, eta], query: memory, gate: true, projection_chunk_size: 32}"],
    "far memory": ["model.mixers.hope={far: {chunk_size: 32}}"],
    "deltanet": [
        "model.mixers.hope={memory: linear, adaptive: [], targets: value, objective: dot, momentum: false, "
        "retention: false, read: inclusive}"
    ],
    "attention": ["model.mixers.hope.kind=attention"],
    "grouped attention": ["model.mixers.hope.kind=attention", "model.mixers.hope={num_kv_heads: 1, qk_norm: true}"],
    "hybrid": [
        "model.mixers.local={kind: attention, num_kv_heads: 1, window: 48}",
        "model.pattern=[hope, local]",
    ],
    "mac": ["model.mixers.hope.kind=titans", "model.mixers.hope={persistent_tokens: 5}"],
    "mag": ["model.mixers.hope.kind=titans", "model.mixers.hope={composition: mag, persistent_tokens: 5, window: 48}"],
    "mag, all in sight": ["model.mixers.hope.kind=titans", "model.mixers.hope={composition: mag, memory: linear}"],
    "mal": [
        "model.mixers.hope.kind=titans",
        "model.mixers.hope={composition: mal, persistent_tokens: 16, window: 48, gate: true}",
    ],
    "sliding window": ["model.mixers.hope.kind=attention", "model.mixers.hope={num_kv_heads: 1, window: 48}"],
}
