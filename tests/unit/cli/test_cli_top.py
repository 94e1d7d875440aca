from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from hopescale.cli.top import spark, view
from hopescale.common.errors import LaunchError
from hopescale.launch.scheduler import Slurm
from hopescale.launch.status import run_status


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 100 steps that stands at step 40."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("step-00000030\n")
    plan = {"total_sequences": 400, "global_batch_size": 4, "dp": 1, "tp": 1, "pp": 1}
    (folder / "plan.json").write_text(json.dumps(plan))
    records = [{"step": 0, "tokens_seen": 0, "val/text/loss": 8.0}]
    records += [
        {"step": step, "tokens_seen": 100 * step, "loss": 8 - step / 10, "lr/decay": 1e-3, "grad_norm": 0.5, "tps": 1e4}
        | {"time/step_s": 0.5, "level/slow/updates": step // 10, "memory/1/eta_mean": 0.1, "memory/1/state_norm": 7.5}
        for step in range(10, 50, 10)
    ]
    records[2]["steps_skipped"] = 2
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def drawn(folder: Path) -> str:
    console = Console(width=140, record=True, force_terminal=False)
    console.print(view(folder, run_status(folder, Slurm())))
    return console.export_text()


def test_a_run_is_drawn_with_what_is_known(run: Path):
    text = drawn(run)
    for part in (
        "stopped",
        "step 40/100",
        "4k tokens",
        "step-00000030",
        "loss 4.0000  █",
        "val/text 8.0000, best here",
    ):
        assert part in text, text
    for part in ("2 bad steps skipped", "decay", "1.00e-03", "gradient norm", "slow", "eta", "0.1", "7.5"):
        assert part in text, text


def test_a_run_without_a_step_is_drawn(tmp_path: Path):
    assert "no step yet" in drawn(tmp_path)


def test_bars_are_means_between_the_least_and_the_largest():
    assert spark([0.0, 1.0, 2.0, 7.0]) == "▁▂▃█"
    assert spark([3.0, 3.0]) == "▁▁"
    assert spark([0.0, 2.0, 7.0, 7.0], width=2) == "▁█"


def test_the_command_draws_once(run: Path, capsys: pytest.CaptureFixture[str]):
    from hopescale.cli.top import top

    top(run, once=True)
    assert "step 40/100" in capsys.readouterr().out
    with pytest.raises(LaunchError, match="there is no run folder"):
        top(run / "none", once=True)
