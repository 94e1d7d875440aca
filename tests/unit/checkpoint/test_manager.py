from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch

from hopescale.checkpoint.manager import CheckpointManager, find_checkpoint, latest_checkpoint
from hopescale.checkpoint.manifest import Manifest, checkpoint_folders, step_of
from hopescale.common.errors import CheckpointError
from hopescale.config.schema import CheckpointConfig


def put(manager: CheckpointManager, *steps: int) -> None:
    for step in steps:
        manager.save(step, {"model": {"w": torch.full((2,), float(step))}}, Manifest({"step": step}, {}, {}))
    manager.wait()


def steps(root: Path) -> list[int]:
    return [step_of(folder) for folder in checkpoint_folders(root)]


def test_due(make_manager):
    manager = make_manager(every=10)
    assert [step for step in range(26) if manager.due(step, last_step=25)] == [10, 20, 25]
    manager = make_manager(every=None)
    assert [step for step in range(26) if manager.due(step, last_step=25)] == [25]


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep_last": 1}, [50]),
        ({"keep_last": 3}, [30, 40, 50]),
        ({"keep_last": 9}, [10, 20, 30, 40, 50]),
        ({"keep_last": 1, "keep_every": 20}, [20, 40, 50]),
    ],
)
def test_retention(make_manager, root: Path, background: bool, settings: dict, kept: list[int]):
    put(make_manager(async_save=background, **settings), 10, 20, 30, 40, 50)
    assert steps(root) == kept
    assert sorted(path.name for path in root.iterdir() if not path.name.startswith("step-")) == ["latest"]


def test_a_broken_checkpoint_does_not_count_as_kept(make_manager, root: Path):
    manager = make_manager(keep_last=2)
    put(manager, 10, 20)
    (root / "step-00000020" / "manifest.json").unlink()
    put(manager, 30)
    assert steps(root) == [10, 20, 30]


def test_what_cannot_be_removed_is_reported_and_does_not_stop_the_run(make_manager, root: Path, monkeypatch, caplog):
    manager = make_manager(keep_last=1)
    put(manager, 10)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", _refuse)
        put(manager, 20)
    assert latest_checkpoint(manager.folder).name == "step-00000020"
    assert "cannot remove the old checkpoint" in caplog.text


def _refuse(path: Path, ignore_errors: bool = False) -> None:
    if not ignore_errors:
        raise PermissionError(13, "Permission denied")


def test_a_run_continued_from_an_earlier_step_keeps_its_own_checkpoints(make_manager, root: Path):
    put(make_manager(keep_last=3), 10, 20, 30)
    manager = make_manager(keep_last=2)
    put(manager, 11, 12)
    assert latest_checkpoint(manager.folder).name == "step-00000012"
    assert steps(root) == [11, 12, 20, 30]
    shutil.rmtree(root / "step-00000012")
    assert latest_checkpoint(manager.folder).name == "step-00000011"
    put(manager, 20)
    assert steps(root) == [11, 20, 30]


def test_a_new_run_has_no_latest(make_manager, root: Path):
    assert latest_checkpoint(root) is None
    assert latest_checkpoint(make_manager().folder) is None


@pytest.mark.parametrize("pointer", [None, "", "nonsense", "step-00000099\n"])
def test_a_bad_pointer_falls_back_with_a_warning(make_manager, root: Path, caplog, pointer: str | None):
    manager = make_manager(keep_last=3)
    put(manager, 10, 20, 30)
    (root / "step-00000030" / "__0_0.distcp").unlink()
    (root / "latest").unlink()
    if pointer is not None:
        (root / "latest").write_text(pointer)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(manager.folder).name == "step-00000020"
    assert "taking step-00000020 instead" in caplog.text


def test_a_good_pointer_gives_no_warning(make_manager, caplog):
    manager = make_manager()
    put(manager, 10)
    assert latest_checkpoint(manager.folder).name == "step-00000010"
    assert not [record for record in caplog.records if record.name.startswith("hopescale")]


def test_only_broken_checkpoints_are_an_error_not_a_new_run(make_manager, root: Path):
    manager = make_manager()
    put(manager, 10)
    (root / "step-00000010" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no complete checkpoint in .*__0_0.distcp has 0 bytes"):
        latest_checkpoint(manager.folder)


def test_leftovers_of_an_interrupted_save_are_removed_at_the_start(make_manager, root: Path):
    put(make_manager(), 10)
    (root / ".tmp-step-00000020").mkdir()
    (root / ".tmp-step-00000020" / "__0_0.distcp").write_bytes(b"half")
    (root / ".tmp-latest").write_text("step-0")
    assert latest_checkpoint(root).name == "step-00000010"
    assert (root / ".tmp-latest").exists()
    make_manager()
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000010"]


@pytest.mark.parametrize("new_arrived", [False, True])
def test_a_kill_while_a_checkpoint_is_replaced_loses_neither(make_manager, root: Path, new_arrived: bool):
    put(make_manager(), 10)
    if new_arrived:
        shutil.copytree(root / "step-00000010", root / ".replaced-step-00000010")
    else:
        (root / "step-00000010").rename(root / ".replaced-step-00000010")
    assert latest_checkpoint(make_manager().folder).name == "step-00000010"
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step-00000010"]


def test_find(make_manager, root: Path):
    manager = make_manager(keep_last=3)
    put(manager, 10, 20)
    assert find_checkpoint(root / "step-00000010") == root / "step-00000010"
    assert find_checkpoint(root) == find_checkpoint(root.parent) == find_checkpoint(root / "step-00000020")
    renamed = (root / "step-00000010").rename(root.parent / "kept")
    assert find_checkpoint(renamed) == renamed
    with pytest.raises(CheckpointError, match="step-00000015 does not exist") as raised:
        find_checkpoint(root / "step-00000015")
    assert raised.value.hint.endswith("step-00000020")
    with pytest.raises(CheckpointError, match=r"as there is no such folder \(.* holds kept\)"):
        find_checkpoint(root.parent / "kepd")


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path: Path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(CheckpointError, match="cannot prepare .*: Not a directory"):
        CheckpointManager(tmp_path / "run" / "checkpoints", CheckpointConfig())
