"""Parts in memory come back bit for bit, and what is torn, changed or not everywhere is not used."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hopescale.checkpoint.manifest import Manifest
from hopescale.checkpoint.memory import MemoryCheckpoints, _candidates, other_node
from hopescale.checkpoint.node_memory import Part, PartNote, read_part
from hopescale.common.errors import CheckpointError
from hopescale.config.schema import MemoryCheckpointConfig
from hopescale.parallel.mesh import Mesh

MANIFEST = Manifest({"step": 4, "x": 0.1}, {"a": [1, None]}, {"model": "m"})


def state(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    stack = torch.randn(3, 5, 7, generator=generator)
    return {
        "model.view": stack[1],
        "model.bf16": stack[2].bfloat16().mT,
        "optimizer.step": torch.tensor(3.0),
        "sums.none": torch.zeros(0, 4),
        "generators.cpu": generator.get_state(),
    }


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def open_of(checkpoints: Path, folder: Path) -> MemoryCheckpoints:
    config = MemoryCheckpointConfig(every=2, folder=str(folder))
    return MemoryCheckpoints(config, checkpoints, Mesh.alone().control_group)


@pytest.fixture
def make(tmp_path: Path) -> Callable[[], MemoryCheckpoints]:
    open_of(tmp_path / "checkpoints", tmp_path / "shm").renew()
    return lambda: open_of(tmp_path / "checkpoints", tmp_path / "shm")


def accept(tensors: dict[str, Tensor], manifest: Manifest) -> None:
    return None


def test_a_part_returns_bit_for_bit_with_its_numbers():
    part = Part(state(0), MANIFEST)
    block = torch.empty(part.size, dtype=torch.uint8)
    part.write(block)
    tensors, manifest = read_part(block)
    assert same(tensors, state(0)) and manifest == MANIFEST


def test_the_newest_step_is_loaded_and_only_it_is_kept(make: Callable[[], MemoryCheckpoints]):
    memory = make()
    for step in (2, 4):
        memory.save(step, state(step), MANIFEST)
    assert [folder.name for folder in memory.node.folder.glob("*/*")] == ["step-00000004"]
    tensors, manifest = make().load(accept, after=3)
    assert same(tensors, state(4)) and manifest == MANIFEST
    assert make().load(accept, after=4) is None
    make().clear()
    assert not memory.node.folder.exists() and make().load(accept, after=-1) is None


def test_what_is_torn_or_changed_is_refused_and_the_step_before_taken(
    make: Callable[[], MemoryCheckpoints], caplog: pytest.LogCaptureFixture
):
    memory = make()
    memory.node.remove = lambda **_: None
    for step in (2, 4, 6):
        memory.save(step, state(step), MANIFEST)
    folders = sorted(memory.node.folder.glob("*/*"))
    (folders[2] / "rank-0.at-0.json").unlink()  # killed before it was noted
    with (folders[1] / "rank-0.at-0").open("r+b") as stream:
        stream.seek(-100, 2)
        stream.write(b"\xff" * 8)
    with caplog.at_level(logging.WARNING):
        tensors, _ = make().load(accept, after=-1)
    assert same(tensors, state(2))
    assert "step 4 in memory is not used: rank 0's part has changed" in caplog.text
    assert make().load(lambda *_: "another layout", after=-1) is None
    assert "step 2 in memory is not used: another layout" in caplog.text


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"short")])
def test_a_note_whose_part_is_gone_counts_for_nothing(
    make: Callable[[], MemoryCheckpoints], damage: Callable[[Path], object]
):
    memory = make()
    memory.save(2, state(2), MANIFEST)
    damage(next(memory.node.folder.rglob("rank-0.at-0")))
    assert make().load(accept, after=-1) is None


def test_a_part_that_goes_while_it_is_loaded_is_a_warning(
    make: Callable[[], MemoryCheckpoints], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    make().save(2, state(2), MANIFEST)
    memory = make()
    notes = memory.node.notes()
    shutil.rmtree(memory.node.folder)
    monkeypatch.setattr(memory.node, "notes", lambda: notes)
    with caplog.at_level(logging.WARNING):
        assert memory.load(accept, after=-1) is None
    assert "step 2 in memory is not used: a part that rank 0 has noted cannot be read" in caplog.text


def test_a_step_counts_if_all_parts_are_of_one_save():
    def note(step: int, rank: int, agreed: int = 1) -> PartNote:
        return PartNote(step, rank, 1, "d", (agreed,))

    own, other = note(4, 0), note(4, 1)
    assert list(_candidates([[own, other], []], 2)) == [(4, [(0, own), (0, other)])]
    assert list(_candidates([[own], [other, note(6, 1)]], 2)) == [(4, [(0, own), (1, other)])]
    assert list(_candidates([[own], [note(4, 1, agreed=2)]], 2)) == []


@pytest.mark.parametrize(
    ("nodes", "shift"), [("a", 0), ("aaaa", 0), ("ab", 1), ("aabb", 2), ("aabbcc", 2), ("abab", 1), ("aab", 1)]
)
def test_a_part_goes_to_another_node(nodes: str, shift: int):
    assert other_node(list(nodes)) == shift


def test_want_of_room_is_an_error_at_first_and_then_a_warning(
    make: Callable[[], MemoryCheckpoints], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    memory = make()
    with monkeypatch.context() as patch:
        patch.setattr("os.posix_fallocate", full)
        with pytest.raises(CheckpointError, match="cannot keep step 2 in .*: no room on a node"):
            memory.save(2, state(2), MANIFEST)
    memory.save(4, state(4), MANIFEST)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("os.posix_fallocate", full)
        memory.save(6, state(6), MANIFEST)
    assert "the one before stays" in caplog.text
    assert same(make().load(accept, after=-1)[0], state(4))


def test_a_course_that_was_given_up_counts_no_more_on_a_node_that_was_away(tmp_path: Path):
    run, here, away = tmp_path / "run", tmp_path / "here", tmp_path / "away"
    memory = open_of(run, away)
    assert not run.exists(), "nothing is written before the run has a folder of its own"
    memory.renew()
    memory.save(4, state(4), MANIFEST)
    assert open_of(run, away).load(accept, after=-1) is not None
    open_of(run, here).renew()
    back = open_of(run, away)
    assert back.load(accept, after=-1) is None
    back.save(2, state(2), MANIFEST)
    assert [folder.name for folder in back.node.folder.glob("*/*")] == ["step-00000002"]


def test_the_copy_of_a_run_has_no_parts_and_touches_none(tmp_path: Path):
    memory = open_of(tmp_path / "run", tmp_path / "shm")
    memory.renew()
    memory.save(2, state(2), MANIFEST)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    copy = open_of(tmp_path / "copy", tmp_path / "shm")
    assert copy.load(accept, after=-1) is None
    copy.renew()
    assert open_of(tmp_path / "run", tmp_path / "shm").load(accept, after=-1) is not None


def test_a_folder_that_others_may_write_in_is_refused(make: Callable[[], MemoryCheckpoints], tmp_path: Path):
    memory = make()
    memory.save(2, state(2), MANIFEST)
    assert memory.node.folder.stat().st_mode & 0o777 == 0o700
    memory.node.folder.chmod(0o750)
    with pytest.raises(CheckpointError, match="is not a folder that is this user's alone"):
        make().load(accept, after=-1)
    other = tmp_path / "shm" / "other"
    memory.node.folder.rename(other)
    other.chmod(0o700)
    memory.node.folder.symlink_to(other)
    with pytest.raises(CheckpointError, match=r"cannot keep step 4 .*is not a folder that is this user's alone"):
        make().save(4, state(4), MANIFEST)
    make().clear()
    assert any(other.rglob("rank-0.at-0")), "what the link names is not removed"
