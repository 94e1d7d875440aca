"""A sweep of trials that take seconds."""

from __future__ import annotations

from collections.abc import Sequence


def toy_sweep(steps: Sequence[int], *extra: str) -> str:
    """Return a sweep's file: a model of almost nothing, one trial per number of steps.

    Args:
        steps: Optimizer steps of each trial.
        extra: Further lines of what is set for all trials, as `checkpoint.every: 10`.
    """
    settings = (
        "model.d_model: 16",
        "model.num_layers: 1",
        "model.vocab_size: 32",
        "model.self_modifying.chunk_size: 8",
        "model.cms.levels.fast.d_ff: 16",
        "model.cms.levels.mid.d_ff: 16",
        "model.cms.levels.slow.d_ff: 16",
        "data.sources.markov.synthetic.num_symbols: 12",
        "train.seq_len: 16",
        "train.micro_batch_size: 2",
        "train.global_batch_tokens: 64",
        "train.validation.tokens: 64",
        "optim.schedule.warmup_steps: 2",
        "log.every: 1",
        "log.tensorboard: false",
        *extra,
    )
    lines = ["name: toy", "recipe: debug", "set:", *(f"  {line}" for line in settings)]
    return "\n".join([*lines, "axes:", f"  train.steps: {list(steps)}"]) + "\n"
