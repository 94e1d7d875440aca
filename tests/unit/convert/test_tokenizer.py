"""`tokenizer.json` against the SentencePiece model it stands for."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as Fast

from hopescale.convert.tokenizer import write_tokenizer
from hopescale.data.text import Document
from hopescale.data.tokenizer import Tokenizer, train_tokenizer

TEXT = (Path(__file__).parents[3] / "README.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "out"
    train_tokenizer([Document(TEXT, "README.md")], out, vocab_size=700)
    write_tokenizer(out)
    return out


def test_ids_and_texts_are_the_same(folder: Path):
    slow, fast = Tokenizer.load(folder), Fast.from_file(str(folder / "tokenizer.json"))
    draw = random.Random(0)
    letters = TEXT + "äß漢🙂\t\r\n  0123456789 \x00"
    texts = [TEXT, *("".join(draw.choices(letters, k=60)) for _ in range(50))]
    for text in texts:
        assert fast.encode(text, add_special_tokens=False).ids == slow.encode(text)
        assert fast.decode(slow.encode(text)) == text
    assert fast.encode("a text").ids == [slow.eos_id, *slow.encode("a text")]


def test_a_model_that_normalises_is_kept_as_it_is(tmp_path: Path):
    lines = [line for line in TEXT.splitlines() if line]
    options = {"vocab_size": 400, "model_type": "unigram", "byte_fallback": True, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "tokenizer"), **options
    )
    assert "load it with sentencepiece" in write_tokenizer(tmp_path)
    assert not (tmp_path / "tokenizer.json").exists()
