"""A run of almost nothing, for tests of everything around it."""

from __future__ import annotations

TINY = (
    "model.d_model=16",
    "model.num_layers=1",
    "model.vocab_size=32",
    "model.mixers.hope.chunk_size=8",
    "model.cms.levels.fast.d_ff=16",
    "model.cms.levels.mid.d_ff=16",
    "model.cms.levels.slow.d_ff=16",
    "data.sources.markov.synthetic.num_symbols=12",
    "train.seq_len=16",
    "train.micro_batch_size=2",
    "train.global_batch_tokens=64",
    "optim.schedule.warmup_steps=2",
    "log.every=1",
    "log.trackers=[]",
)
"""Overrides of the recipe `debug`."""
