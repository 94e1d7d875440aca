"""The tokenizer of an export against the one of training."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from hopescale.convert.tokenizer import NATIVE_TOKENIZER, write_tokenizer
from hopescale.data.text import Document
from hopescale.data.tokenizer import Tokenizer, train_tokenizer

TEXT = (Path(__file__).parents[3] / "README.md").read_text()
LETTERS = TEXT + "äß漢🙂ﬁⅣ\u2581\t\r\n  0123456789 \x00"
MARKS = ("a</s>b", "<unk> and <0x41>", "a\u2581b", "\u2581", "  two  spaces\n\nline \n", "")


def texts() -> list[str]:
    draw = random.Random(0)
    return [TEXT, *MARKS, *("".join(draw.choices(LETTERS, k=60)) for _ in range(50))]


def train_spm(folder: Path, **options) -> None:
    lines = [line for line in TEXT.splitlines() if line]
    options = {"vocab_size": 400, "model_type": "unigram", "byte_fallback": True, "minloglevel": 2} | options
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "tokenizer"), **options
    )


@pytest.fixture(params=["ours", "normalising", "prefixed", "unigram"])
def folder(request, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    if request.param == "ours":
        train_tokenizer([Document(TEXT, "README.md")], out, vocab_size=700)
        return out
    out.mkdir()
    exact = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    train_spm(
        out,
        **{
            "normalising": {},
            "prefixed": {"model_type": "bpe", **exact},
            "unigram": {"add_dummy_prefix": False, **exact},
        }[request.param],
    )
    return out


def test_ids_and_texts_are_those_of_training(folder: Path, tmp_path: Path):
    write_tokenizer(folder, own_code=True)
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    theirs.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    for text in texts():
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids
        assert again(text).input_ids == [ours.eos_id, *ids]
        assert theirs.decode([*ids, ours.eos_id], skip_special_tokens=True) == ours.decode(ids)
    padded = theirs(["a", "a longer text"], padding=True).input_ids
    assert len(padded[0]) == len(padded[1]) and padded[0][0] == ours.eos_id
    assert theirs.decode([ours.eos_id]) == theirs.eos_token
    assert len(theirs) == ours.vocab_size


def test_a_folder_without_our_code_offers_no_tokenizer_that_gives_other_ids(tmp_path: Path):
    train_spm(tmp_path)
    assert "load it with sentencepiece" in write_tokenizer(tmp_path, own_code=False)
    assert [file.name for file in tmp_path.glob("*tok*")] == ["tokenizer.vocab"]
    assert (tmp_path / NATIVE_TOKENIZER).exists()
