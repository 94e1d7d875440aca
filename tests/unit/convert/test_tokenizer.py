"""The tokenizer of an export against the one of training."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from hopescale.convert.tokenizer import NATIVE_TOKENIZER, write_tokenizer
from hopescale.data.load_tokenizer import load_tokenizer
from hopescale.data.records import Document
from hopescale.data.train_tokenizer import train_tokenizer
from tests.support.json_tokenizers import KINDS, make_tokenizer

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
    write_tokenizer(load_tokenizer(folder), folder, own_code=True)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
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
    assert "load it with sentencepiece" in write_tokenizer(load_tokenizer(tmp_path), tmp_path, own_code=False)
    assert [file.name for file in tmp_path.glob("*tok*")] == ["tokenizer.vocab"]
    assert (tmp_path / NATIVE_TOKENIZER).exists()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_json_is_passed_on_with_the_ids_of_training(kind: str, tmp_path: Path):
    make_tokenizer(kind, TEXT.splitlines(), tmp_path / "in")
    template = {"chat_template": "{{ messages }}"}
    settings = json.loads((tmp_path / "in" / "tokenizer_config.json").read_text()) | template
    (tmp_path / "in" / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = load_tokenizer(tmp_path / "in")
    (tmp_path / "out").mkdir()
    write_tokenizer(ours, tmp_path / "out", own_code=False)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.chat_template == template["chat_template"] and theirs.eos_token_id == ours.eos_id
    for text in [*texts(), f"a{ours.eos_token}b <think>"]:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ids
        assert theirs(text).input_ids == [ours.eos_id, *ids]
        assert theirs.decode(ids) == ours.decode(ids) or ours.eos_id in ids
    assert load_tokenizer(tmp_path / "out").fingerprint == ours.fingerprint
