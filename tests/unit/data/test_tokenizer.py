from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece

from hopescale.common.errors import DataError
from hopescale.data import sentencepiece_tokenizer as module
from hopescale.data import train_tokenizer as training
from hopescale.data.load_tokenizer import load_tokenizer
from hopescale.data.records import Document
from hopescale.data.sentencepiece_tokenizer import SentencePieceTokenizer
from hopescale.data.tokenizer import Tokenizer
from hopescale.data.train_tokenizer import train_tokenizer

EXACT = [
    "def f(x):\n    if x:\n\treturn  x   \n\n\n",
    "\t\t mixed \t tabs\r\nand\rline ends\x0b\x0c",
    "emoji 😀👩‍👩‍👧, accents é e\u0301, 漢字, \u200b zero width",
    "the space symbol \u2581 itself \u2581\u2581 \u2581",
    "<s></s><unk><0x0A> look like marks",
    "nul \0 and the last code point \U0010ffff",
    "\ufeffmark",
    " ",
    "",
]


@pytest.mark.parametrize("text", EXACT)
def test_decoding_an_encoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= id < tokenizer.vocab_size and id != tokenizer.eos_id for id in ids)


def test_a_long_text_is_cut_without_loss(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, make_documents) -> None:
    text = "".join(document.text for document in make_documents(5)) + "x" * 500 + "\u2581 end"
    monkeypatch.setattr(module, "_SPAN", 64)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_batches_and_threads_change_nothing(tokenizer: Tokenizer, make_documents) -> None:
    texts = [document.text for document in make_documents(20)] + EXACT
    assert tokenizer.encode_batch(texts, num_threads=3) == [tokenizer.encode(text) for text in texts]


def test_white_space_and_words_become_single_pieces(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("        ")) < 4
    assert len(tokenizer.encode("memory")) == 1


def test_marks_are_fixed_and_decode_to_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_id == 1
    assert tokenizer.decode([*tokenizer.encode("a\n"), tokenizer.eos_id, *tokenizer.encode("b")]) == "a\nb"


def test_ids_that_the_vocabulary_lacks_give_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([*tokenizer.encode("a"), 330, *tokenizer.encode("b")]) == "ab"
    with pytest.raises(ValueError, match="-1"):
        tokenizer.decode([5, -1])


def test_a_lone_surrogate_is_a_data_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_a_copy_has_the_same_fingerprint(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (path,) = tokenizer.copy_to(tmp_path)
    assert path == tmp_path / "tokenizer.model"
    for place in (path, tmp_path):
        assert load_tokenizer(place).fingerprint == tokenizer.fingerprint


def test_training_is_deterministic_and_sees_the_text(tokenizer: Tokenizer, tmp_path: Path, make_documents) -> None:
    train_tokenizer(make_documents(60), tmp_path / "same", vocab_size=330)
    train_tokenizer(make_documents(60, seed=1), tmp_path / "other", vocab_size=330)
    assert load_tokenizer(tmp_path / "same").fingerprint == tokenizer.fingerprint
    assert load_tokenizer(tmp_path / "other").fingerprint != tokenizer.fingerprint


def test_sample_and_reading_are_bounded(tmp_path: Path, make_documents) -> None:
    consumed = 0

    def endless():
        nonlocal consumed
        while True:
            for document in make_documents(50, seed=consumed):
                consumed += 1
                yield document

    summary = train_tokenizer(endless(), tmp_path / "tok", vocab_size=330, sample_bytes=20_000)
    assert 15_000 < summary.sample_bytes <= 20_000
    assert 1_000_000 <= summary.read_bytes < 1_100_000
    assert summary.bytes_per_token > 1.5


def test_the_sample_is_spread_over_all_that_was_read() -> None:
    documents = [Document(f"{number:04d} " + "x" * 95, "") for number in range(1000)]
    chunks, read = training._sample(documents, 10_000)
    numbers = [int(chunk[:4]) for chunk in chunks]
    assert read == 100_000 and len(chunks) == 100
    assert numbers == sorted(set(numbers))
    assert 30 < sum(number < 500 for number in numbers) < 70


@pytest.mark.parametrize(("vocab_size", "message"), [(50_000, "too large"), (100, "too small")])
def test_a_vocabulary_the_text_cannot_fill_is_a_data_error(
    tmp_path: Path, vocab_size: int, message: str, make_documents
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        train_tokenizer(make_documents(20), tmp_path / "tok", vocab_size=vocab_size)
    assert str(vocab_size) in str(caught.value) and "hint" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_no_text_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([], tmp_path / "tok", vocab_size=300)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"not a model", b"\0" * 64])
def test_a_file_that_is_no_model_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(DataError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path)


def test_a_missing_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere.*No such file"):
        load_tokenizer(tmp_path / "nowhere")


def test_training_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str], make_documents) -> None:
    train_tokenizer(make_documents(20), tmp_path / "tok", vocab_size=320)
    assert capfd.readouterr() == ("", "")


def test_a_foreign_model_that_adds_a_space_is_left_whole(make_documents) -> None:
    model = io.BytesIO()
    lines = [line for document in make_documents(40) for line in document.text.splitlines()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=70, minloglevel=2, hard_vocab_limit=False
    )
    foreign = SentencePieceTokenizer(model.getvalue())
    assert foreign.decode(foreign.encode("memory \u2581 state")) == "memory state"
