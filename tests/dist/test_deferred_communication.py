"""A level that is not due sends nothing: bytes as counted, over a whole period of the slowest level."""

from __future__ import annotations

from pathlib import Path

import pytest

from hopescale.observe.metrics import read_metrics
from tests.support.layouts import train_run
from tests.support.ranks import run_ranks

PERIODS = (1, 4, 16, 64)
SMALL = (
    "model.num_layers=1",
    "model.d_model=16",
    "model.num_heads=1",
    "model.mixers.hope.memory=linear",
    "train.seq_len=8",
    "train.global_batch_tokens=16",
    "train.steps=64",
    "train.validation.every=null",
    "train.replica_check_every=null",
    "checkpoint.every=null",
)


def levels(periods: tuple[int, ...], phases: tuple[int, ...]) -> str:
    parts = [
        f"l{index}: {{d_ff: 16, update_every_steps: {period}, phase: {phase}}}"
        for index, (period, phase) in enumerate(zip(periods, phases, strict=True))
    ]
    return "model.cms.levels={fast: null, mid: null, slow: null, " + ", ".join(parts) + "}"


def train_both(rank: int, folder: Path, options: tuple[str, ...]) -> None:
    train_run(folder / "every step", 2, *SMALL, levels((1, 1, 1, 1), (0, 0, 0, 0)), *options, last_step=64)
    train_run(folder / "in turn", 2, *SMALL, levels(PERIODS, (0, 1, 2, 3)), *options, last_step=64)


def sent(folder: Path, name: str) -> list[float]:
    return [record.get(name, 0) for record in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("zero", [0, 1])
def test_slow_levels_send_when_they_are_due(zero: int, tmp_path: Path):
    """Four levels of one size: of four shares, 1 + 1/4 + 1/16 + 1/64 are sent."""
    run_ranks(train_both, 2, tmp_path, tmp_path, (f"parallel.zero={zero}",))
    often, seldom = tmp_path / "every step", tmp_path / "in turn"
    names = [f"level/l{index}/bytes" for index in range(4)]
    total = {run: [sum(sent(run, name)) for name in names] for run in (often, seldom)}
    assert len(set(total[often])) == 1 and total[often][0] > 0
    assert sum(total[seldom]) / sum(total[often]) == (1 + 1 / 4 + 1 / 16 + 1 / 64) / 4 <= 0.34
    for index, period in enumerate(PERIODS):
        due = [step for step, count in enumerate(sent(seldom, names[index]), start=1) if count]
        assert due == [step for step in range(1, 65) if (step + index) % period == 0 or period == 1]
    # Nothing else is sent in their place.
    whole = {run: sum(sent(run, "comm/dp/bytes_per_step")) for run in (often, seldom)}
    spared = sum(total[often]) - sum(total[seldom])
    if zero == 0:
        assert whole[often] - whole[seldom] == spared
    else:
        assert whole[often] - whole[seldom] > spared
