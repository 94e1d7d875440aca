from __future__ import annotations

import math
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hopescale.common.errors import ConfigError, DataError
from hopescale.config.schema import DataConfig, SourceConfig, SyntheticConfig
from hopescale.config.schema.suite import SuiteConfig
from hopescale.data.identity import fingerprint_here
from hopescale.data.load_tokenizer import load_tokenizer
from hopescale.data.loader import Batch, Data, Share, open_data, prefetched
from hopescale.data.prepare import prepare
from hopescale.data.train_tokenizer import train_tokenizer

SEQ_LEN = 64
VOCAB_SIZE = 330


def synthetic(**options) -> SourceConfig:
    return SourceConfig(synthetic=SyntheticConfig(num_samples=options.pop("num_samples", 1000)), **options)


def open_(
    *, vocab_size: int = VOCAB_SIZE, seq_len: int = SEQ_LEN, seed: int = 0, max_epochs: int = 1, **sources
) -> Data:
    named = {n: SourceConfig(path=str(s)) if isinstance(s, Path) else s for n, s in sources.items()}
    config = DataConfig(sources=named, seed=seed, max_epochs=max_epochs)
    return open_data(config, seq_len=seq_len, vocab_size=vocab_size)


def rows_of(data: Data, indices) -> list[bytes]:
    return [row.numpy().tobytes() for row in data.batch(indices).tokens]


@pytest.fixture
def text(make_data) -> Path:
    return make_data()


@pytest.fixture
def mixed(text: Path) -> Data:
    return open_(text=text, made=synthetic(weight=0.5))


def test_a_batch_has_the_promised_shapes(mixed: Data) -> None:
    batch = mixed.batch([5, 0, 99])
    assert isinstance(batch, Batch)
    assert [part.dtype for part in batch[:3]] == [torch.int64, torch.int64, torch.int32]
    assert all(part.shape == (3, SEQ_LEN) for part in batch[:3])
    assert mixed.tokenizer.vocab_size == VOCAB_SIZE


def test_each_window_is_read_once_per_epoch(text: Path) -> None:
    data = open_(text=text)
    size = data._sources["text"].train.num_samples
    epochs = [rows_of(data, range(epoch * size, (epoch + 1) * size)) for epoch in range(2)]
    in_order = data._sources["text"].train.read(range(size)).tokens
    expected = sorted(row.tobytes() for row in in_order)
    assert sorted(epochs[0]) == sorted(epochs[1]) == expected
    assert epochs[0] != epochs[1] and len(set(expected)) == size > 50


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_order_does_not_depend_on_the_number_of_ranks(mixed: Data, world_size: int) -> None:
    whole = rows_of(mixed, range(48))
    shares = [
        [rows_of(mixed, [step * world_size + rank])[0] for step in range(48 // world_size)]
        for rank in range(world_size)
    ]
    assert [row for step in zip(*shares, strict=True) for row in step] == whole


def test_any_index_can_be_read_first(text: Path) -> None:
    first, again = (open_(text=text, made=synthetic()) for _ in range(2))
    late = rows_of(first, range(100))[60:]
    assert rows_of(again, range(60, 100)) == late
    assert first.fingerprint == again.fingerprint


def test_the_seed_changes_the_order(text: Path) -> None:
    assert rows_of(open_(text=text), range(20)) != rows_of(open_(text=text, seed=1), range(20))


def test_sources_come_by_weight(mixed: Data) -> None:
    made = sum("source made" in mixed.locate(index) for index in range(4096))
    assert made == 1365


def test_the_fingerprint_tells_what_is_read(text: Path, make_data) -> None:
    other = make_data("other", seed=4)
    prints = {
        open_(text=text).fingerprint,
        open_(text=other).fingerprint,
        open_(text=text, seed=1).fingerprint,
        open_(text=text, seq_len=32).fingerprint,
        open_(text=text, made=synthetic()).fingerprint,
        open_(text=text, made=synthetic(weight=2.0)).fingerprint,
    }
    assert len(prints) == 6
    assert open_(text=text, max_epochs=3).fingerprint in prints


def test_the_fingerprint_is_known_without_opening_the_data(text: Path) -> None:
    suite = SourceConfig(suite=SuiteConfig(task="parity"))
    data = open_(text=text, made=synthetic(weight=2.0), asked=suite, gone=None)
    assert fingerprint_here(data._config, data._seq_len) == data.fingerprint
    away = replace(data._config, sources={"text": SourceConfig(path="s3://bucket/data")})
    assert fingerprint_here(away, data._seq_len) is None


def test_an_index_is_located_in_words(mixed: Data, text: Path) -> None:
    places = [mixed.locate(index) for index in range(8)]
    of_text = next(place for place in places if place.startswith("source text"))
    assert "epoch 0, window " in of_text and f"{text}/train-00000" in of_text and " tokens " in of_text
    assert any(place.startswith("source made, epoch 0, synthetic markov, train sample") for place in places)


def test_a_run_that_repeats_a_source_is_refused_with_both_numbers(text: Path) -> None:
    data = open_(text=text, made=synthetic(num_samples=40))
    have = data._num_samples["text"]
    data.check_budget(80)
    with pytest.raises(ConfigError) as caught:
        data.check_budget(4 * have)
    message = str(caught.value)
    assert f"reads {2 * have:,} sequences of it, 2 epochs, but it has {have:,}" in message
    assert "data.max_epochs=2" in message and "data.sources.made" in message
    open_(text=text, made=synthetic(), max_epochs=2).check_budget(4 * have)


def test_validation_starts_over_and_covers_what_was_asked(text: Path) -> None:
    data = open_(text=text, made=synthetic())
    assert data.validation_sets == ["text", "made"]
    runs = [list(data.validation("made", 10 * SEQ_LEN, 4)) for _ in range(2)]
    assert [len(batch.tokens) for batch in runs[0]] == [4, 4, 2]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(*runs, strict=True))
    for size in (1, 4):  # whatever a batch holds
        assert [len(batch.tokens) for batch in data.validation("made", 1, size)] == [1]
    whole = torch.cat([batch.tokens for batch in data.validation("text", 10**9, 4)])
    assert len(whole) == data._sources["text"].validation.num_samples


def test_validation_text_is_not_training_text(text: Path) -> None:
    data = open_(text=text)
    decode = data.tokenizer.decode
    titles = [
        {line for row in rows for line in decode(row.tolist()).splitlines()[1:-1] if line.startswith("# document")}
        for rows in (
            torch.cat([batch.tokens for batch in data.validation("text", 10**9, 8)]),
            data.batch(range(data._num_samples["text"])).tokens,
        )
    ]
    assert titles[0] and titles[0].isdisjoint(titles[1])


def test_bits_per_byte_are_those_of_the_held_out_text(text: Path) -> None:
    data = open_(text=text, made=synthetic())
    assert 1 / 10 < data.bits_per_byte("text", math.log(2)) < 1 / 1.5
    assert data.bits_per_byte("text", 2.0) == pytest.approx(2 * data.bits_per_byte("text", 1.0))
    assert data.bits_per_byte("made", 1.0) is None


def test_synthetic_data_alone_needs_no_files() -> None:
    data = open_(made=synthetic(), vocab_size=26)
    assert data.tokenizer is None and data.batch([0]).tokens.max() < 26


def test_sources_without_held_out_text_have_no_validation(make_data) -> None:
    data = open_(text=make_data(validation=0))
    assert data.validation_sets == [] and data.bits_per_byte("text", 1.0) is None


def test_null_removes_a_source(text: Path) -> None:
    assert open_(text=text, gone=None).validation_sets == ["text"]


def test_a_wrong_vocabulary_is_named_with_both_sizes(text: Path) -> None:
    with pytest.raises(ConfigError, match="model.vocab_size: is 4096, but the tokenizer of .* has 330"):
        open_(text=text, vocab_size=4096)


def test_different_tokenizers_are_refused(text: Path, tmp_path: Path, make_documents) -> None:
    train_tokenizer(make_documents(60, seed=8), tmp_path / "tok", vocab_size=VOCAB_SIZE)
    prepare(make_documents(40), load_tokenizer(tmp_path / "tok"), tmp_path / "other", validation=0.1)
    with pytest.raises(ConfigError, match="data.sources: different tokenizers: text has .*, other has"):
        open_(text=text, other=tmp_path / "other")


def test_a_split_shorter_than_a_window_is_named(text: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        open_(text=text, seq_len=100_000)
    assert len(caught.value.problems) == 2
    assert "one sequence needs 100001" in str(caught.value) and "--validation" in str(caught.value)


def test_all_problems_come_at_once(text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        open_(
            text=text,
            gone=tmp_path / "gone",
            both=SourceConfig(path="x", synthetic=SyntheticConfig()),
            tiny=synthetic(weight=1e-6),
            big=SourceConfig(synthetic=SyntheticConfig(num_symbols=500)),
            vocab_size=40,
        )
    keys = sorted(problem.key for problem in caught.value.problems)
    assert keys == [
        "data.sources.big.synthetic.num_symbols",
        "data.sources.big.synthetic.num_symbols",
        "data.sources.both",
        "data.sources.gone.path",
        "data.sources.tiny.weight",
        "model.vocab_size",
    ]


def test_missing_or_damaged_files_alone_are_a_data_error(text: Path, tmp_path: Path) -> None:
    os.truncate(text / "train-000000.tar", 100)
    with pytest.raises(DataError) as caught:
        open_(text=text, gone=tmp_path / "gone", made=synthetic())
    message = str(caught.value)
    assert "data.sources.text.path: shards of" in message and "train-000000.tar (100 bytes" in message
    assert "data.sources.gone.path: cannot read" in message


def test_no_source_is_named() -> None:
    with pytest.raises(ConfigError, match="no data set to read"):
        open_()


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetching_changes_nothing(mixed: Data, depth: int) -> None:
    plan = [[0, 1], [2, 3], [4], [5, 6, 7]]
    batches = list(prefetched(mixed, iter(plan), depth))
    assert len(batches) == len(plan)
    assert all(
        torch.equal(batch.tokens, mixed.batch(indices).tokens) for batch, indices in zip(batches, plan, strict=True)
    )
    assert not prefetch_threads()


@pytest.mark.parametrize("depth", [0, 2])
def test_batches_for_a_gpu_lie_in_page_locked_memory(mixed: Data, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.shape) or tensor)
    moved = next(prefetched(mixed, [[0, 1]], depth, pinned=True)).to(torch.device("meta"))
    assert pinned == [mixed.batch([0, 1]).tokens.shape] * 2
    assert moved.document_ids.device.type == "cpu", "the host finds where documents lie"
    assert not list(prefetched(mixed, [], depth)) and len(pinned) == 2


@pytest.mark.parametrize("depth", [0, 2])
def test_an_error_arrives_at_its_batch(mixed: Data, depth: int) -> None:
    def plan():
        yield [0]
        yield [1]
        raise DataError("shard gone")

    batches = prefetched(mixed, plan(), depth)
    assert torch.equal(next(batches).tokens, mixed.batch([0]).tokens)
    next(batches)
    with pytest.raises(DataError, match="shard gone"):
        next(batches)
    assert not prefetch_threads()


def test_closing_early_ends_the_thread(mixed: Data) -> None:
    batches = prefetched(mixed, ([index] for index in range(10**9)), 2)
    next(batches)
    assert len(prefetch_threads()) == 1
    batches.close()
    assert not prefetch_threads()


def test_only_so_much_is_read_ahead(mixed: Data) -> None:
    asked = []
    batches = prefetched(mixed, (asked.append(index) or [index] for index in range(100)), 3)
    next(batches)
    deadline = time.monotonic() + 5
    while len(asked) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(asked) == 5  # one given, three held ready, one in the thread's hand
    batches.close()


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("data-prefetch")]


@pytest.mark.parametrize(("ranks", "segments"), [(1, 1), (4, 1), (2, 3)])
def test_ranks_that_share_sequences_hold_each_token_once(ranks: int, segments: int):
    """Piece `p` lies on rank `p mod ranks`, and a rank has its pieces in the order of the sequence."""
    tokens = torch.arange(48).view(2, 24)
    batch = Batch(tokens, tokens + 100, tokens.int())
    shares = [batch.share(Share(rank, ranks, segments)) for rank in range(ranks)]
    size = 24 // (ranks * segments)
    for rank, share in enumerate(shares):
        places = [place for place in range(24) if place // size % ranks == rank]
        assert share.tokens.tolist() == tokens[:, places].tolist()
        assert torch.equal(share.targets, share.tokens + 100) and share.document_ids.dtype == torch.int32


@pytest.mark.parametrize(("ranks", "segments"), [(4, 1), (2, 3), (1, 3)])
def test_pieces_know_how_much_of_their_first_document_came_before(ranks: int, segments: int):
    ids = torch.tensor([[n for n, size in enumerate(row) for _ in range(size)] for row in ([5, 1, 18], [8, 4, 12])])
    batch, size = Batch(ids, ids, ids.int()), 24 // (ranks * segments)
    places = torch.tensor([[place for size in row for place in range(size)] for row in ([5, 1, 18], [8, 4, 12])])
    for rank in range(ranks):
        pieces = batch.share(Share(rank, ranks, segments)).pieces(segments, within_documents=True)
        assert len(pieces) == segments
        for number, piece in enumerate(pieces):
            begin = (number * ranks + rank) * size
            assert torch.equal(piece.document_ids, ids.int()[:, begin : begin + size])
            assert piece.begun.tolist() == places[:, begin : begin + 1].tolist()


def test_a_share_is_what_is_read_ahead(mixed: Data):
    share = Share(1, 2, 2)
    (found,) = prefetched(mixed, [[3, 5]], 1, share=share)
    assert all(map(torch.equal, found, mixed.batch([3, 5]).share(share)))
