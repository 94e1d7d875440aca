"""A run goes on from memory where that is later than the disk, and from no course that it has given up."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hopescale.engine import Engine

if TYPE_CHECKING:
    from conftest import Run


class Killed(BaseException):
    """An end of the process that the run knows nothing of."""


@pytest.fixture
def killed(train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Train until a step begins, then end without a word; return the steps that have begun.

    Every step is saved in memory, and every third one on disk. With `bad`, the loss of this step is NaN while the rate
    is whole, and the end comes when the rate is lower; the folder `away` keeps what was in memory at that step.
    """
    memory = f"memory: {{every: 1, folder: {tmp_path / 'shm'}}}"
    gradients = Engine.gradients

    def start(*options: object, at: int, bad: int | None = None) -> list[int]:
        begun: list[int] = []

        def until(engine: Engine, step: int, *arguments, **named):
            begun.append(step)
            is_whole = engine.optimizer.rate_factor == 1
            if step == at and (bad is None or not is_whole):
                raise Killed
            found = gradients(engine, step, *arguments, **named)
            if step != bad or not is_whole:
                return found
            shutil.copytree(tmp_path / "shm", tmp_path / "away")
            found.values[0] = math.nan  # the loss
            return found

        monkeypatch.setattr(Engine, "gradients", until)
        with pytest.raises(Killed):
            train(f"checkpoint={{every: 3, async_save: false, {memory}}}", "train.validation.every=null", *options)
        return begun

    return start


def bring_back(folder: Path) -> None:
    """Let a node return that was away, with what it had in memory."""
    shutil.rmtree(folder / "shm", ignore_errors=True)
    shutil.move(folder / "away", folder / "shm")


def test_a_start_takes_what_is_later_and_of_its_course(run: Run, killed, tmp_path: Path):
    assert killed(at=5) == [1, 2, 3, 4, 5] and run.steps() == [3]
    assert killed(at=6) == [5, 6] and run.steps() == [3, 4], "step 4 is on disk before the next begins"
    shutil.copytree(tmp_path / "shm", tmp_path / "away")
    assert killed("--resume", run.checkpoint(4), at=5) == [5]
    bring_back(tmp_path)
    assert killed(at=5) == [5], "step 5 in memory is of the course that was given up"


def test_a_run_that_goes_back_gives_up_what_is_in_memory(run: Run, killed, tmp_path: Path):
    back = ("train.recovery.skips=0", "train.recovery.then=lower_rate")
    assert killed(*back, at=4, bad=6) == [1, 2, 3, 4, 5, 6, 4] and run.steps() == [3]
    bring_back(tmp_path)
    assert killed(*back, at=4) == [4], "step 5 in memory is of the course that was given up"
