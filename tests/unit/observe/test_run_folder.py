from __future__ import annotations

from pathlib import Path

import pytest

from hopescale.common.errors import LaunchError
from hopescale.observe.run_folder import SWEEP_MARKS, require_own


def test_a_folder_of_somebody_else_s_is_refused_by_the_names_in_it(tmp_path: Path):
    for name in ("config.yaml", "env.txt", "metrics.jsonl", "a", "b", ".hidden"):
        (tmp_path / name).write_text("precious")
    with pytest.raises(LaunchError) as caught:
        require_own(tmp_path, "--run-dir")
    message = (
        f"--run-dir {tmp_path} is not empty and not a folder of hopescale's: a, b, config.yaml, env.txt and 1 more"
    )
    assert caught.value.message == f"{message} could be replaced"
    assert caught.value.hint == "choose another folder, or move the files elsewhere"


@pytest.mark.parametrize("names", [[], [".lock", ".DS_Store"]])
def test_a_folder_that_holds_nothing_is_anyone_s(tmp_path: Path, names: list[str]):
    for name in names:
        (tmp_path / name).write_text("")
    require_own(tmp_path, "--run-dir")
    require_own(tmp_path / "missing", "--run-dir")


@pytest.mark.parametrize(
    "mark", ["origins.json", "trial.json", "jobs.jsonl", "checkpoints/step-00000004/manifest", "checkpoints/run"]
)
def test_a_run_s_own_folder_may_hold_anything(tmp_path: Path, mark: str):
    (tmp_path / mark).parent.mkdir(parents=True, exist_ok=True)
    for name in (mark, "notes.txt"):
        (tmp_path / name).write_text("")
    require_own(tmp_path, "--run-dir")


def test_a_sweep_s_file_may_lie_in_its_folder(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("")
    require_own(tmp_path, "--sweep-dir", SWEEP_MARKS, also=(file,))
    (tmp_path / "points.csv").write_text("precious")
    with pytest.raises(LaunchError, match=r": points\.csv could be replaced"):
        require_own(tmp_path, "--sweep-dir", SWEEP_MARKS, also=(file,))
    (tmp_path / "trials").mkdir()
    require_own(tmp_path, "--sweep-dir", SWEEP_MARKS)
