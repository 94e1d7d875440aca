from __future__ import annotations

import errno
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset

from hopescale.common.errors import DataError
from hopescale.data import shards
from hopescale.data.dataset import PreparedData
from hopescale.data.prepare import prepare
from hopescale.data.records import Document
from hopescale.data.shards import Index, describe_shard
from hopescale.data.tokenizer import Tokenizer


def texts_of(data: PreparedData, split: str) -> list[str]:
    return [data.tokenizer.decode(tokens) for tokens in data.splits[split].documents()]


def test_every_document_arrives_once_and_whole(make_data, make_documents) -> None:
    data = PreparedData(make_data())
    assert Counter(texts_of(data, "train") + texts_of(data, "validation")) == Counter(
        document.text for document in make_documents(60)
    )
    for split in data.splits.values():
        tokens = split.read(0, split.num_tokens)
        ends = np.flatnonzero(tokens == data.tokenizer.eos_id)
        assert len(ends) == split.num_documents and ends[-1] == split.num_tokens - 1
        assert split.num_text_bytes == sum(len(text.encode()) for text in texts_of(data, split.split))
    assert len(data.index.splits["train"]) > 2


def test_equal_input_gives_equal_bytes(make_data) -> None:
    first, second, other = make_data("a"), make_data("b"), make_data("c", seed=1)
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (first, second, other)]
    assert contents[0] == contents[1]
    assert contents[0]["index.json"] != contents[2]["index.json"]
    assert {"index.json", "tokenizer.model", "train-000000.tar", "validation-000000.tar"} <= set(contents[0])
    assert not any("partial" in name for name in contents[0])


def test_documents_are_shuffled_by_the_seed(make_data, make_documents) -> None:
    def first_lines(**options) -> list[str]:
        folder = make_data(f"seed{options['seed']}", validation=0, **options)
        return [text.split("\n")[0] for text in texts_of(PreparedData(folder), "train")]

    orders = [first_lines(seed=seed) for seed in (0, 1)]
    written = [document.text.split("\n")[0] for document in make_documents(60)]
    assert orders[0] != orders[1] and written not in orders
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(written)


def test_threads_change_nothing(make_data) -> None:
    one, three = make_data("one", num_threads=1), make_data("three", num_threads=3)
    assert (one / "index.json").read_bytes() == (three / "index.json").read_bytes()


def test_copies_of_a_text_stay_on_one_side(make_data, make_documents) -> None:
    documents = make_documents(40, longest=4)
    copies = random.Random(0).sample(documents * 3, 120)
    data = PreparedData(make_data(documents=copies, validation=0.3))
    train, held_out = (Counter(texts_of(data, split)) for split in ("train", "validation"))
    assert train.keys().isdisjoint(held_out)
    assert set(train.values()) == set(held_out.values()) == {3}
    assert 20 < held_out.total() < 60


def test_held_out_documents_do_not_depend_on_the_others(make_data, make_documents) -> None:
    documents = make_documents(60)
    whole = PreparedData(make_data("whole", validation=0.2))
    half = PreparedData(make_data("half", documents=documents[:30], validation=0.2))
    assert set(texts_of(half, "validation")) == set(texts_of(whole, "validation")) & {d.text for d in documents[:30]}


def test_at_least_one_document_is_held_out(make_data, make_documents) -> None:
    data = PreparedData(make_data(documents=make_documents(5), validation=1e-9))
    assert data.splits["validation"].num_documents == 1
    assert data.splits["train"].num_documents == 4


def test_nothing_is_held_out_on_request(make_data) -> None:
    data = PreparedData(make_data(validation=0))
    assert (data.splits["train"].num_documents, data.splits["validation"].num_tokens) == (60, 0)
    assert data.index.splits["validation"] == []


def test_a_single_document_cannot_be_split(make_data, tmp_path: Path, make_documents) -> None:
    with pytest.raises(DataError, match=r"hold out 0.1 of 1 document:[^\0]*--separator"):
        make_data(documents=make_documents(1))
    assert not list(tmp_path.iterdir())


def test_webdataset_reads_the_shards(make_data) -> None:
    folder = make_data()
    data = PreparedData(folder)
    files = [str(folder / entry.file) for entry in data.index.splits["train"]]
    samples = list(webdataset.WebDataset(files, shardshuffle=False).decode())
    tokens = np.concatenate([sample["tokens.npy"] for sample in samples])
    documents = np.concatenate([sample["documents.npy"] for sample in samples])
    assert tokens.dtype == np.uint16 and documents.dtype == np.int64
    np.testing.assert_array_equal(tokens, data.splits["train"].read(0, data.splits["train"].num_tokens))
    np.testing.assert_array_equal(documents.sum(0), [len(tokens), data.splits["train"].num_text_bytes])
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(len(samples))]


def test_blocks_hold_whole_documents_and_a_long_one_stands_alone(make_data, make_documents) -> None:
    documents = [*make_documents(30, longest=5), Document("long " * 2000, "long")]
    folder = make_data(documents=documents, validation=0)
    tables = [entry.blocks for entry in Index.read(folder).splits["train"]]
    sizes = [(size, count) for t in tables for size, count in zip(t.num_tokens, t.num_documents, strict=True)]
    assert sum(count for _, count in sizes) == 31
    over = [count for size, count in sizes if size > 500]
    assert over == [1]


def test_a_shard_describes_itself(make_data) -> None:
    folder = make_data()
    for entry in Index.read(folder).splits["train"]:
        assert describe_shard(folder / entry.file) == entry


def test_token_type_follows_the_vocabulary() -> None:
    assert [shards.token_dtype(size).str for size in (300, 65535, 65536)] == ["<u2", "<u2", "<u4"]


def test_no_documents_is_a_data_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no documents"):
        prepare([], tokenizer, tmp_path / "data")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused_and_untouched(make_data) -> None:
    folder = make_data()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DataError, match="already exists"):
        make_data(seed=9)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_an_error_in_the_input_leaves_nothing(tokenizer: Tokenizer, tmp_path: Path, make_documents) -> None:
    def broken():
        yield from make_documents(3)
        raise DataError("line 4 is bad")

    with pytest.raises(DataError, match="line 4 is bad"):
        prepare(broken(), tokenizer, tmp_path / "data")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["shard", "index", "sync"])
def test_a_full_disk_is_one_message_and_leaves_nothing(
    make_data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "precious.txt").write_text("keep me")
    target = {
        "shard": "data.shards.SplitWriter._flush",
        "index": "data.shards.Index.write",
        "sync": "common.disk.os.fsync",
    }[stage]
    monkeypatch.setattr(f"hopescale.{target}", full)
    with pytest.raises(DataError, match="cannot write .*data: No space left on device.*\n.*hint: free some space"):
        make_data()
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_an_unwritable_place_is_one_message(tokenizer: Tokenizer, tmp_path: Path, make_documents) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot write .*Not a directory"):
        prepare(make_documents(3), tokenizer, tmp_path / "file" / "data")
