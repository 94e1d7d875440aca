from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from hopescale.common.errors import DataError
from hopescale.config.schema import DataConfig, SourceConfig
from hopescale.data.loader import open_data
from hopescale.data.shards import Index
from hopescale.data.staged import copy_of, stage
from hopescale.data.storage import INDEX_FILE


@pytest.fixture
def text(make_data) -> Path:
    return make_data()


def num_shards(folder: Path) -> int:
    return sum(map(len, Index.read(folder).splits.values()))


def test_a_copy_is_read_in_place_of_the_original_and_is_the_same_data(text: Path, make_data, tmp_path: Path) -> None:
    root, other = tmp_path / "node" / "copies", make_data("other", seed=4)
    config = DataConfig(sources={"text": SourceConfig(path=str(text)), "other": SourceConfig(path=str(other))})
    with pytest.raises(DataError, match="holds no copy of"):
        open_data(replace(config, staged=str(root)), seq_len=64, vocab_size=330)
    for source in (text, other):
        stage(source, root)
    original = open_data(config, seq_len=64, vocab_size=330)
    for shard in [*text.glob("*.tar"), *other.glob("*.tar")]:
        shard.unlink()
    copied = open_data(replace(config, staged=str(root)), seq_len=64, vocab_size=330)
    assert copied.fingerprint == original.fingerprint
    assert copied.batch(range(8)).tokens.shape == (8, 64)
    assert str(root) in copied.locate(0)


def test_what_is_there_and_right_stays(text: Path, tmp_path: Path) -> None:
    root, shards = tmp_path / "copies", num_shards(text)
    first = stage(text, root)
    assert (first.copied, first.kept) == (shards, 0) and first.num_bytes > 0 and first.folder == copy_of(text, root)
    again = stage(text, root)
    assert (again.copied, again.kept, again.num_bytes) == (0, shards, 0)

    changed, cut, gone, *_ = sorted(first.folder.glob("train-*.tar"))
    content = bytearray(changed.read_bytes())
    content[-600] ^= 1
    changed.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    (first.folder / f"{gone.name}.partial").write_bytes(b"torn by a kill")
    third = stage(text, root)
    assert (third.copied, third.kept) == (3, shards - 3)
    assert {path.name: path.read_bytes() for path in text.iterdir()} == {
        path.name: path.read_bytes() for path in first.folder.iterdir() if path.name != ".lock"
    }


def test_the_same_data_under_another_path_has_the_same_copy(text: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(text, tmp_path / "moved")
    assert stage(text, tmp_path / "copies").copied
    assert stage(moved, tmp_path / "copies").copied == 0


def test_a_damaged_original_is_named_and_leaves_no_copy(text: Path, tmp_path: Path) -> None:
    shard = sorted(text.glob("train-*.tar"))[1]
    content = bytearray(shard.read_bytes())
    content[-600] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=f"{shard.name} is damaged: SHA-256"):
        stage(text, tmp_path / "copies")
    with pytest.raises(DataError, match="holds no copy"):
        copy_of(text, tmp_path / "copies")
    assert not list((tmp_path / "copies").rglob("*.partial"))


def test_a_disk_that_is_too_small_or_not_writable_is_named(text: Path, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("hopescale.data.staged.shutil.disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(DataError, match="lacks space: .* to copy, 1000B free"):
            stage(text, tmp_path / "copies")
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    with pytest.raises(DataError, match="cannot copy .*blocked"):
        stage(text, blocked)
    with pytest.raises(DataError, match=f"cannot read .*{INDEX_FILE}"):
        stage(tmp_path / "nothing", tmp_path / "copies")
