from __future__ import annotations

import pytest

from hopescale.common.errors import ConfigError
from hopescale.data.load_tokenizer import load_tokenizer
from hopescale.data.records import Document
from hopescale.data.tokenizer import Tokenizer
from hopescale.data.train_tokenizer import train_tokenizer
from hopescale.infer.text import decode_stream, encode_prompt


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("infer") / "tok"
    texts = ["the memory of a level keeps what a token wrote\n" * 5 + f"word{n} " * 9 for n in range(20)]
    train_tokenizer([Document(text, str(n)) for n, text in enumerate(texts)], folder, vocab_size=300)
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    "text", ["the memory", "  two  spaces\n\tand a tab ", "naïve “quotes” – 量子 🙂🙂 end", "🙂", ""]
)
def test_a_stream_is_the_text_in_whole_characters(tokenizer: Tokenizer, text: str):
    pieces = list(decode_stream(iter(tokenizer.encode(text)), tokenizer))
    assert "".join(pieces) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_a_character_is_held_back_until_it_is_whole(tokenizer: Tokenizer):
    ids = tokenizer.encode("a🙂b")
    assert len(ids) == 6  # four bytes between two letters
    asked = []
    pieces = decode_stream((asked.append(i) or i for i in ids), tokenizer)
    assert next(pieces) == "a" and len(asked) == 1
    assert next(pieces) == "🙂" and len(asked) == 5
    assert next(pieces) == "b"


def test_text_comes_as_soon_as_its_token(tokenizer: Tokenizer):
    asked = []
    pieces = decode_stream((asked.append(i) or i for i in tokenizer.encode("the memory of")), tokenizer)
    for count, piece in enumerate(pieces, start=1):
        if piece:
            assert len(asked) == count


def test_a_stream_that_ends_within_a_character_shows_that(tokenizer: Tokenizer):
    ids = tokenizer.encode("a🙂")[:-1]
    text = "".join(decode_stream(ids, tokenizer))
    assert text[0] == "a" and set(text[1:]) == {"\N{REPLACEMENT CHARACTER}"}


def test_bytes_that_are_no_text_do_not_stop_the_stream(tokenizer: Tokenizer):
    lone = tokenizer.encode("🙂")[1]
    ids = [*tokenizer.encode("a"), lone, *tokenizer.encode("the level")]
    text = "".join(decode_stream(ids, tokenizer))
    assert text == "a\N{REPLACEMENT CHARACTER}the level"


def test_a_continuation_keeps_its_first_space(tokenizer: Tokenizer):
    """Shown after the prompt, the two must be one text."""
    ids = tokenizer.encode("the memory of a level")
    for cut in range(1, len(ids)):
        assert tokenizer.decode(ids[:cut]) + "".join(decode_stream(ids[cut:], tokenizer)) == "the memory of a level"


def test_a_prompt_begins_as_every_document_does(tokenizer: Tokenizer):
    assert encode_prompt("the level", tokenizer, 300) == [tokenizer.eos_id, *tokenizer.encode("the level")]
    assert encode_prompt("", tokenizer, 300) == [tokenizer.eos_id]


def test_without_tokenizer_a_prompt_is_symbols():
    assert encode_prompt(" 3 0\n31 ", None, 32) == [3, 0, 31]
    assert list(decode_stream([3, 0, 31], None)) == ["3 ", "0 ", "31 "]


@pytest.mark.parametrize("prompt", ["", "  ", "hello", "1 two", "1.5", "-1 3", "3 32"])
def test_a_prompt_that_is_no_symbols_is_refused_with_the_range(prompt: str):
    with pytest.raises(ConfigError) as caught:
        encode_prompt(prompt, None, 32)
    assert repr(prompt) in caught.value.message and "0 to 31" in caught.value.hint
    assert caught.value.exit_code == 2


def test_an_empty_stream_is_empty(tokenizer: Tokenizer):
    assert "".join(decode_stream([], tokenizer)) == "" == "".join(decode_stream([], None))


def test_a_prompt_begins_a_text_or_goes_on_with_one(tokenizer: Tokenizer):
    ids = tokenizer.encode("the memory")
    assert encode_prompt("the memory", tokenizer, 300) == [tokenizer.eos_id, *ids]
    assert encode_prompt("the memory", tokenizer, 300, goes_on=True) == ids
    assert encode_prompt("", tokenizer, 300, goes_on=True) == encode_prompt("", None, 32, goes_on=True) == []
    with pytest.raises(ConfigError, match="numbers from 0 to 31"):
        encode_prompt("", None, 32)
