"""A Hope with MLP memories learns to repeat what it has read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hopescale.cli.app import main


@pytest.mark.timeout(1500)
def test_copy_of_24_symbols_is_learned_within_400_steps(tmp_path: Path):
    with pytest.raises(SystemExit) as ended:
        main(["train", "copy", "checkpoint.every=null", "log.tensorboard=false", "--run-dir", str(tmp_path)])
    assert ended.value.code == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["val/copy/loss"] for record in records if "val/copy/loss" in record}
    assert losses[0] > 3.0, "chance is ln 24 = 3.18"
    assert max(losses) == 400
    assert losses[400] < 0.05
