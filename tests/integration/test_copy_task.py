"""A Hope with MLP memories learns to repeat what it has read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hopescale.cli.app import main

SYMBOLS, STEPS = 8, 250
"""A third of what the recipe repeats, and fewer steps: the same lesson in a fifth of the time."""


@pytest.mark.timeout(1500)
def test_copy_of_8_symbols_is_learned_within_250_steps(tmp_path: Path):
    shorter = [f"data.sources.copy.synthetic.num_symbols={SYMBOLS}", f"train.seq_len={2 * SYMBOLS}"]
    shorter += [f"train.global_batch_tokens={32 * 2 * SYMBOLS}", "train.validation={every: 125, tokens: 2048}"]
    shorter += [f"train.steps={STEPS}"]
    with pytest.raises(SystemExit) as ended:
        main(["train", "copy", *shorter, "checkpoint.every=null", "log.trackers=[]", "--run-dir", str(tmp_path)])
    assert ended.value.code == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["val/copy/loss"] for record in records if "val/copy/loss" in record}
    assert losses[0] > 2, "chance is ln 8 = 2.08"
    assert max(losses) == STEPS
    assert losses[STEPS] < 0.05
