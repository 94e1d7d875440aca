from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hopescale.common.errors import HopescaleError
from hopescale.observe.trackers import TensorBoardTracker


def shown(folder: Path, name: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def write(folder: Path, resume_step: int | None, values: dict[int, float]) -> None:
    tracker = TensorBoardTracker(folder, resume_step=resume_step)
    for step, value in values.items():
        tracker.log(step, {"loss": value, "lr/decay": 0.5})
    tracker.close()


def test_values_are_shown_before_the_file_is_closed(tmp_path: Path):
    tracker = TensorBoardTracker(tmp_path / "tb", resume_step=None)
    tracker.log(10, {"loss": 4.0})
    tracker.log(20, {"loss": 3.0})
    assert shown(tmp_path / "tb", "loss") == [(10, 4.0), (20, 3.0)]
    tracker.close()


def test_a_resume_replaces_later_steps_in_the_same_folder(tmp_path: Path):
    write(tmp_path, None, {10: 4.0, 20: 3.0, 30: 2.0})
    write(tmp_path, 20, {30: 1.0, 40: 0.5})
    assert shown(tmp_path, "loss") == [(10, 4.0), (20, 3.0), (30, 1.0), (40, 0.5)]
    assert shown(tmp_path, "lr/decay")[-1] == (40, 0.5)
    assert all(path.is_file() for path in tmp_path.iterdir())


def test_a_run_begun_anew_hides_the_old_one(tmp_path: Path):
    write(tmp_path, None, {10: 4.0, 20: 3.0})
    write(tmp_path, None, {10: 1.0})
    assert shown(tmp_path, "loss") == [(10, 1.0)]


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path: Path):
    (tmp_path / "tb").write_text("a file")
    with pytest.raises(HopescaleError, match="cannot write .*tb"):
        TensorBoardTracker(tmp_path / "tb", resume_step=None)
