from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from hopescale.common.errors import DataError
from hopescale.data.dataset import PreparedData
from hopescale.data.inspect import first_documents, verify, window_texts
from hopescale.data.samples import PackedSamples
from hopescale.data.train_tokenizer import train_tokenizer


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


@pytest.fixture
def folder(make_data) -> Path:
    return make_data()


def test_any_range_equals_the_slice_of_the_whole(folder: Path) -> None:
    stream = PreparedData(folder).splits["train"]
    whole = stream.read(0, stream.num_tokens)
    draw = np.random.default_rng(0)
    for start, stop in np.sort(draw.integers(0, stream.num_tokens + 1, size=(100, 2)), axis=1):
        if start < stop:
            np.testing.assert_array_equal(stream.read(int(start), int(stop)), whole[start:stop])


def test_documents_begin_with_the_end_of_text_before_them(folder: Path) -> None:
    """A prompt begins so too: of documents that are kept apart a model must have seen it there."""
    data = PreparedData(folder)
    stream = data.splits["train"]
    tokens = stream.read(0, stream.num_tokens)
    for start, stop in [(0, stream.num_tokens), (137, 2900), (5, 6)]:
        ids = stream.document_ids(start, stop)
        ended = np.cumsum(tokens[start:stop] == data.tokenizer.eos_id)
        np.testing.assert_array_equal(ids, ended - ended[0])
        assert ids.dtype == np.int32


def test_windows_tile_the_stream_with_targets_one_later(folder: Path) -> None:
    stream = PreparedData(folder).splits["train"]
    samples = PackedSamples(stream, 64)
    assert samples.num_samples == (stream.num_tokens - 1) // 64
    rows = samples.read(range(samples.num_samples))
    whole = stream.read(0, stream.num_tokens).astype(np.int64)
    used = samples.num_samples * 64
    np.testing.assert_array_equal(rows.tokens.ravel(), whole[:used])
    np.testing.assert_array_equal(rows.targets.ravel(), whole[1 : used + 1])
    assert rows.tokens.dtype == rows.targets.dtype == np.int64
    assert (rows.document_ids[:, 0] == 0).all() and rows.document_ids.max() > 0


def test_a_range_is_described_by_shard_and_place(folder: Path) -> None:
    data = PreparedData(folder)
    stream, (first, second, *_) = data.splits["train"], data.index.splits["train"]
    assert stream.describe(10, 20) == f"{folder / first.file} tokens 10..20"
    border = first.num_tokens
    assert stream.describe(border - 5, border + 7) == (
        f"{folder / first.file} tokens {border - 5}..{border}, {folder / second.file} tokens 0..7"
    )


def test_sums_and_texts_can_be_looked_at(folder: Path) -> None:
    data = PreparedData(folder)
    train, held_out = data.splits.values()
    assert (train.split, held_out.split) == ("train", "validation")
    assert train.num_documents + held_out.num_documents == 60
    documents = list(first_documents(data, "train", 3))
    assert len(documents) == 3 and all(text.startswith("# document") for _, text in documents)
    parts = window_texts(data, "train", 1, 200)
    assert len(parts) > 1 and all(part.startswith("# document") for part in parts[1:])
    with pytest.raises(DataError, match="no window 100000"):
        window_texts(data, "train", 100_000, 200)


def test_a_sound_data_set_verifies(folder: Path) -> None:
    seen = []
    verify(folder, seen.append)
    assert seen == sorted(path.name for path in folder.glob("*.tar"))


def test_verify_names_every_bad_shard(folder: Path) -> None:
    entries = PreparedData(folder).index.splits["train"]
    overwrite(folder / entries[0].file, entries[0].blocks.tokens_offset[0], b"\x02\x00")
    (folder / entries[1].file).unlink()
    os.truncate(folder / entries[2].file, 700)
    with pytest.raises(DataError) as caught:
        verify(folder)
    message = str(caught.value)
    assert "3 of" in message and f"{entries[0].file}: SHA-256" in message
    assert "No such file" in message and all(entry.file in message for entry in entries[:3])


def test_verify_finds_an_index_that_lies(folder: Path) -> None:
    content = json.loads((folder / "index.json").read_text())
    content["splits"]["train"][0]["blocks"]["tokens_offset"][0] += 2
    (folder / "index.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match="train-000000.tar: its checksum is right, but the index"):
        verify(folder)


def test_opening_names_shards_that_are_missing_or_cut(folder: Path) -> None:
    (folder / "train-000001.tar").unlink()
    os.truncate(folder / "train-000000.tar", 5000)
    with pytest.raises(DataError, match=r"train-000000.tar \(5,000 bytes, .*train-000001.tar \(No such file") as caught:
        PreparedData(folder)
    assert "hopescale data verify" in caught.value.hint


@pytest.mark.parametrize("damage", ["truncated", "removed", "bad id", "bad table"])
def test_damage_after_opening_is_found_by_reading(folder: Path, damage: str) -> None:
    data = PreparedData(folder)
    entry = data.index.splits["train"][0]
    path, block = folder / entry.file, entry.blocks
    match damage:
        case "truncated":
            os.truncate(path, block.tokens_offset[0] + 10)
        case "removed":
            path.unlink()
        case "bad id":
            overwrite(path, block.tokens_offset[0] + 8, b"\xff\xff")
        case "bad table":
            overwrite(path, block.documents_offset[0], b"\x01")
    with pytest.raises(DataError, match="train-000000.tar is damaged") as caught:
        PackedSamples(data.splits["train"], 64).read([0])
    assert "hopescale data verify" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot read .*index.json: No such file"),
        ("{", "index.json is damaged: not valid JSON"),
        ("[]", "not an index this version reads"),
        ('{"format": "hopescale-data", "version": 7}', "it has version 7, known is 1"),
        ('{"format": "hopescale-data", "version": 1}', "index.json is damaged: KeyError"),
    ],
)
def test_an_index_that_cannot_be_read_is_named(tmp_path: Path, content: str | None, expected: str) -> None:
    if content is not None:
        (tmp_path / "index.json").write_text(content)
    with pytest.raises(DataError, match=expected):
        PreparedData(tmp_path)


def test_another_tokenizer_beside_the_index_is_refused(folder: Path, make_documents) -> None:
    model = folder / "tokenizer.model"
    train_tokenizer(make_documents(40, seed=5), folder / "new", vocab_size=330)
    model.write_bytes((folder / "new" / "tokenizer.model").read_bytes())
    for check in (PreparedData, verify):
        with pytest.raises(DataError, match="is not the tokenizer of this data set"):
            check(folder)
