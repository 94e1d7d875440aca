"""Data sets on object stores: the same samples, whatever pieces are kept and however often the network fails."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from hopescale.common import object_store
from hopescale.common.errors import ConfigError, DataError
from hopescale.config.schema import DataConfig, SourceConfig
from hopescale.data import storage
from hopescale.data.dataset import PreparedData
from hopescale.data.inspect import verify
from hopescale.data.loader import open_data
from hopescale.data.staged import stage
from hopescale.data.storage import publish

ADDRESS = "memory://bucket/data"


@pytest.fixture
def local(make_data, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data set in a folder and at an address, read in pieces smaller than its blocks, without waits."""
    monkeypatch.setattr(storage, "PIECE", 700)
    monkeypatch.setattr(object_store, "_WAITS", (0.0, 0.0))
    folder = make_data()
    publish(folder, ADDRESS)
    yield folder
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def open_both(local: Path, **settings) -> list:
    opened = []
    for path in (str(local), ADDRESS):
        config = replace(DataConfig(sources={"main": SourceConfig(path=path)}, seed=3), **settings)
        opened.append(open_data(config, seq_len=48, vocab_size=330))
    return opened


def test_samples_are_those_of_the_folder(local: Path, tmp_path: Path) -> None:
    for settings in ({}, {"cache": str(tmp_path / "cache")}, {"cache": str(tmp_path / "cache")}):
        here, there = open_both(local, **settings)
        assert here.fingerprint == there.fingerprint
        for start in (0, 8):
            mine, theirs = here.batch(range(start, start + 8)), there.batch(range(start, start + 8))
            assert mine.tokens.equal(theirs.tokens) and mine.document_ids.equal(theirs.document_ids)
        assert ADDRESS in there.locate(0)


def test_what_is_kept_is_not_read_again(local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = PreparedData(ADDRESS, cache=tmp_path).splits["train"]
    expected = stream.read(0, 300)
    data = PreparedData(ADDRESS, cache=tmp_path)
    monkeypatch.setattr(object_store.ObjectStore, "read_range", None)
    assert (data.splits["train"].read(0, 300) == expected).all()
    with pytest.raises(TypeError):
        data.splits["train"].read(0, stream.num_tokens)


def test_a_shard_that_has_changed_is_read_again(local: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = min(file for file in local.iterdir() if file.name.startswith("train"))
    storage.open_storage(ADDRESS, tmp_path / "cache").read(shard.name, 0, 200)
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / f"{shard.name}.0").write_bytes(b"of no version")
    store = object_store.ObjectStore(ADDRESS)
    content = store.read(shard.name)
    store.write(shard.name, content[:100] + bytes(byte ^ 1 for byte in content[100:200]) + content[200:])
    opened = storage.open_storage(ADDRESS, tmp_path / "cache")
    assert opened.read(shard.name, 0, 200) == store.read(shard.name)[:200] != content[:200]
    assert f"{shard.name} has changed since it was kept in" in caplog.text
    assert len(list(folder.glob(f"{shard.name}.0*"))) == 1


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        ({"ETag": "a", "LastModified": 1, "size": 5}, {"ETag": "a", "LastModified": 2, "size": 5}, True),
        ({"etag": "a", "size": 5}, {"etag": "b", "size": 5}, False),
        ({"Last-Modified": "1", "size": 5}, {"Last-Modified": "2", "size": 5}, False),
        ({"url": "x", "size": 5}, {"url": "x", "size": 6}, False),
        ({"url": "x", "size": 5}, {"url": "y", "size": 5}, True),
    ],
)
def test_a_version_is_of_the_etag_or_of_size_and_time(monkeypatch, one: dict, other: dict, is_same: bool) -> None:
    answers = iter((one, other))
    monkeypatch.setattr(fsspec.filesystem("memory"), "info", lambda path: next(answers))
    store = object_store.ObjectStore("memory://bucket")
    assert (store.version("shard") == store.version("shard")) == is_same


def test_a_cache_named_by_a_variable_that_is_not_set_is_refused(local: Path, monkeypatch) -> None:
    monkeypatch.delenv("NO_SUCH_FOLDER", raising=False)
    for cache in ("$NO_SUCH_FOLDER/shards", "/tmp/${NO_SUCH_FOLDER}"):
        with pytest.raises(DataError, match="but the variable NO_SUCH_FOLDER is not set here"):
            PreparedData(ADDRESS, cache=cache)


def test_a_network_that_fails_now_and_then_changes_nothing(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, calls = type(fsspec.filesystem("memory")), []
    honest = memory.cat_file

    def fails_twice(self, *args, **kwargs):
        calls.append(args)
        if len(calls) % 3:
            raise ConnectionError("reset by peer")
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(memory, "cat_file", fails_twice)
    here, there = open_both(local)
    assert here.batch(range(8)).tokens.equal(there.batch(range(8)).tokens)
    monkeypatch.setattr(
        memory, "cat_file", lambda self, *args, **kwargs: (_ for _ in ()).throw(ConnectionError("gone"))
    )
    with pytest.raises(DataError, match=r"is damaged: no answer after 2 retries \(ConnectionError: gone\)"):
        there.batch(range(100, 140))


def test_addresses_are_verified_and_staged(local: Path, tmp_path: Path) -> None:
    assert verify(ADDRESS).vocab_size == 330
    staged = stage(ADDRESS, tmp_path / "copies")
    assert {f.name: f.read_bytes() for f in staged.folder.iterdir() if f.name != ".lock"} == {
        f.name: f.read_bytes() for f in local.iterdir()
    }
    memory = fsspec.filesystem("memory")
    shard = next(path for path in memory.ls("/bucket/data", detail=False) if "train" in path)
    memory.pipe_file(shard, memory.cat_file(shard)[:-600] + b"x" * 600)
    with pytest.raises(DataError, match="1 of .* shards of memory://bucket/data are damaged"):
        verify(ADDRESS)
    memory.pipe_file(shard, b"short")
    with pytest.raises(DataError, match=r"shards of memory://bucket/data are damaged: train-\d+.tar \(5 bytes"):
        PreparedData(ADDRESS)


def test_what_is_not_there_is_named(local: Path) -> None:
    with pytest.raises(DataError, match="memory://bucket/none holds no data set: there is no index.json"):
        PreparedData("memory://bucket/none")
    with pytest.raises(DataError, match="output memory://bucket/data already exists"):
        publish(local, ADDRESS)
    with pytest.raises((DataError, ConfigError), match="nosuch"):
        PreparedData("nosuch://bucket/data")


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(DataError, match="cannot read s3://b/data: Install s3fs") as caught:
        PreparedData("s3://b/data")
    assert "hopescale[s3]" in caught.value.hint


def test_a_real_store_gives_the_same(make_data, s3_bucket: str, tmp_path: Path) -> None:
    folder = make_data()
    publish(folder, f"{s3_bucket}/data")
    there, here = PreparedData(f"{s3_bucket}/data", cache=tmp_path / "cache"), PreparedData(folder)
    shutil.rmtree(folder)
    assert there.identity == here.identity and verify(f"{s3_bucket}/data").vocab_size == 330
    stream = there.splits["train"]
    assert sum(map(len, stream.documents())) == stream.num_tokens
