"""The range of every number in the config, as intervals by dotted key; `*` stands for the name of an entry."""

from __future__ import annotations

from fnmatch import fnmatchcase

_COUNT = "[1, inf)"
_POSITIVE = "(0, inf)"
_FRACTION = "(0, 1)"
_SEED = "[0, 4294967295]"

RANGES: dict[str, str] = {
    "model.vocab_size": "[2, inf)",
    "model.d_model": _COUNT,
    "model.num_layers": _COUNT,
    "model.num_heads": _COUNT,
    "model.head_dim": _COUNT,
    "model.norm_eps": _POSITIVE,
    "model.init_std": _POSITIVE,
    "model.self_modifying.memory_dim": _COUNT,
    "model.self_modifying.chunk_size": _COUNT,
    "model.self_modifying.projection_chunk_size": _COUNT,
    "model.self_modifying.eta_max": "(0, 2]",
    "model.self_modifying.eta_init": _FRACTION,
    "model.self_modifying.alpha_init": _FRACTION,
    "model.self_modifying.mu_init": _FRACTION,
    "model.self_modifying.error_cap": _POSITIVE,
    "model.self_modifying.conv_width": _COUNT,
    "model.attention.num_kv_heads": _COUNT,
    "model.attention.rope_theta": "(1, inf)",
    "model.attention.rope_scaling.factor": "[1, inf)",
    "model.attention.rope_scaling.low_freq_factor": _POSITIVE,
    "model.attention.rope_scaling.high_freq_factor": _POSITIVE,
    "model.attention.rope_scaling.first_context": _COUNT,
    "model.transfer.base_width": _COUNT,
    "model.transfer.base_head_dim": _COUNT,
    "model.cms.levels.*.d_ff": _COUNT,
    "model.cms.levels.*.update_every_steps": _COUNT,
    "model.cms.levels.*.phase": "[0, inf)",
    "data.sources.*.weight": _POSITIVE,
    "data.sources.*.synthetic.num_symbols": "[2, inf)",
    "data.sources.*.synthetic.num_samples": _COUNT,
    "data.seed": _SEED,
    "data.max_epochs": _COUNT,
    "data.prefetch": "[0, inf)",
    "optim.lr": _POSITIVE,
    "optim.betas": "[0, 1)",
    "optim.eps": _POSITIVE,
    "optim.weight_decay": "[0, inf)",
    "optim.grad_clip": _POSITIVE,
    "optim.groups.*.lr_scale": "[0, inf)",
    "optim.groups.*.weight_decay": "[0, inf)",
    "optim.groups.*.betas": "[0, 1)",
    "optim.muon.momentum": "[0, 1)",
    "optim.muon.ns_steps": _COUNT,
    "optim.muon.eps": _POSITIVE,
    "optim.m3.beta1": _FRACTION,
    "optim.m3.beta2": _FRACTION,
    "optim.m3.beta3": _FRACTION,
    "optim.m3.alpha_slow": "[0, inf)",
    "optim.m3.frequency": _COUNT,
    "optim.m3.ns_steps": _COUNT,
    "optim.m3.eps": _POSITIVE,
    "optim.m3.update_rms": _POSITIVE,
    "optim.delta_momentum.momentum": "[0, 1)",
    "optim.delta_momentum.delta": "[0, 1]",
    "optim.delta_momentum.beta2": _FRACTION,
    "optim.delta_momentum.eps": _POSITIVE,
    "optim.deep_momentum.alpha": "[0, 1]",
    "optim.deep_momentum.inner_lr": _POSITIVE,
    "optim.deep_momentum.memory_dim": _COUNT,
    "optim.deep_momentum.update_rms": _POSITIVE,
    "optim.schedule.warmup_steps": "[0, inf)",
    "optim.schedule.min_lr_ratio": "[0, 1]",
    "optim.schedule.decay_fraction": "(0, 1]",
    "train.steps": _COUNT,
    "train.seq_len": _COUNT,
    "train.micro_batch_size": _COUNT,
    "train.global_batch_tokens": _COUNT,
    "train.replica_check_every": _COUNT,
    "train.seed": _SEED,
    "train.loss_spike": _POSITIVE,
    "train.validation.every": _COUNT,
    "train.validation.tokens": _COUNT,
    "parallel.dp": _COUNT,
    "parallel.tp": _COUNT,
    "parallel.pp": _COUNT,
    "parallel.virtual_stages": _COUNT,
    "parallel.zero": "[0, 3]",
    "parallel.timeout_s": _COUNT,
    "parallel.first_step_timeout_s": _COUNT,
    "checkpoint.every": _COUNT,
    "checkpoint.keep_last": _COUNT,
    "checkpoint.keep_every": _COUNT,
    "log.every": _COUNT,
}


def find_range(key: str) -> str | None:
    """Return the interval of a dotted key, `[1, inf)` or `(0, 2]`, or None for a key that is no number."""
    return next((interval for pattern, interval in RANGES.items() if fnmatchcase(key, pattern)), None)


def contains(interval: str, value: float) -> bool:
    """Tell whether an interval holds a value; round brackets leave their end out."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    return above and below


def describe(interval: str) -> str:
    """Say an interval in words: `at least 1`, `above 0`, `in (0, 2]`."""
    low, high = interval[1:-1].split(", ")
    if high != "inf":
        return f"in {interval}"
    return f"above {low}" if interval[0] == "(" else f"at least {low}"
