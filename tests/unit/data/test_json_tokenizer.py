from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from hopescale.common.errors import DataError
from hopescale.data.dataset import PreparedData
from hopescale.data.load_tokenizer import load_tokenizer
from hopescale.data.prepare import prepare
from hopescale.data.records import Document
from hopescale.data.tokenizer_losses import RoundTrip
from hopescale.data.train_tokenizer import train_tokenizer
from hopescale.infer.text import decode_stream
from tests.support.json_tokenizers import KINDS, make_tokenizer

TEXT = (Path(__file__).parents[3] / "README.md").read_text()
NUM_STRINGS = 2000
PIECES = (
    *(
        "the memory",
        " of",
        "A",
        "é",
        "e\u0301",
        "ﬁⅣ",
        "漢字",
        "🙂",
        "👩‍👧",
        "\u2581",
        "\ufffd",
        "\x00",
        "\u200b",
        "ß",
        "İ",
    ),
    *("\n", "\r\n", "\t", " ", "  ", "   ", "\u00a0", "\u3000", "1234567", "3.14e-7", "don't", "...", "##ed", "<0x41>"),
    *("<|endoftext|>", "</s>", "<unk>", "[SEP]", "[UNK]", "<think>", "<s>", "<|eot_id|>", "ÿ", "\U0010ffff", "\x7f"),
)
"""Parts of odd strings: other forms of letters, white space of all kinds, marks, and what decoders treat by itself."""


def odd_strings(count: int) -> list[str]:
    draw = random.Random(0)
    return ["", *("".join(draw.choices(PIECES, k=draw.randint(1, 12))) for _ in range(count - 1))]


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("json") / request.param
    make_tokenizer(request.param, TEXT.splitlines(), path)
    return path


def test_ids_are_those_of_the_library(folder: Path) -> None:
    from tokenizers import Tokenizer as Library

    ours, library, texts = (
        load_tokenizer(folder),
        Library.from_file(str(folder / "tokenizer.json")),
        [
            TEXT,
            *odd_strings(NUM_STRINGS),
        ],
    )
    library.no_truncation()
    expected = [library.encode(text, add_special_tokens=False).ids for text in texts]
    assert ours.encode_batch(texts) == expected
    assert ours.encode_batch(texts, num_threads=2) == expected
    assert [ours.encode(text) for text in texts[:20]] == expected[:20]
    assert ours.eos_token not in ours.decode(expected[0] + [ours.eos_id])
    assert all(max(ids, default=0) < ours.vocab_size for ids in expected)


def test_a_stream_of_any_ids_is_their_text(folder: Path) -> None:
    """Random ids cut characters in two, mix bytes with pieces, and hold marks in the middle."""
    tokenizer, draw = load_tokenizer(folder), random.Random(1)
    for _ in range(300):
        ids = [draw.randrange(tokenizer.vocab_size + 3) for _ in range(draw.randint(1, 20))]
        assert "".join(decode_stream(ids, tokenizer)) == tokenizer.decode(ids)
    for text in odd_strings(200):
        ids = tokenizer.encode(text)
        assert "".join(decode_stream(ids, tokenizer)) == tokenizer.decode(ids)


def test_a_copy_gives_the_same_ids_and_fingerprint(folder: Path, tmp_path: Path) -> None:
    ours = load_tokenizer(folder)
    ours.copy_to(tmp_path)
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(place).fingerprint == ours.fingerprint
    assert load_tokenizer(tmp_path).encode_batch(odd_strings(50)) == ours.encode_batch(odd_strings(50))
    split = load_tokenizer(folder, split_special_tokens=True)
    assert split.fingerprint != ours.fingerprint
    assert ours.eos_id in ours.encode(f"a{ours.eos_token}b")
    if folder.name != "unigram":  # whose model has the mark among its pieces
        assert split.eos_id not in split.encode(f"a{ours.eos_token}b")
    split.copy_to(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == split.fingerprint


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ends") / "tok"
    make_tokenizer("llama3", TEXT.splitlines(), path, vocab_size=300)
    return path


@pytest.mark.parametrize(
    ("files", "token", "origin"),
    [
        ({"tokenizer_config.json": {"eos_token": {"content": "<|eot_id|>"}}}, "<|eot_id|>", "tokenizer_config.json"),
        ({"special_tokens_map.json": {"eos_token": "<|eot_id|>"}}, "<|eot_id|>", "special_tokens_map.json"),
        ({"generation_config.json": {"eos_token_id": 1}}, "<|end_of_text|>", "generation_config.json"),
        ({"config.json": {"eos_token_id": [2]}}, "<|eot_id|>", "config.json"),
        (
            {"tokenizer_config.json": {"eos_token": "<|eot_id|>"}, "generation_config.json": {"eos_token_id": [1, 2]}},
            "<|eot_id|>",
            "tokenizer_config.json",
        ),
    ],
)
def test_the_end_of_text_is_found(gpt2: Path, tmp_path: Path, files: dict, token: str, origin: str) -> None:
    shutil.copy(gpt2 / "tokenizer.json", tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_token, tokenizer.eos_origin) == (token, origin)
    assert load_tokenizer(tmp_path, end_of_text="<think>").eos_token == "<think>"


@pytest.mark.parametrize(
    ("files", "end", "message"),
    [
        ({}, None, "which token ends a text; its special tokens are '<|begin_of_text|>', '<|end_of_text|>'"),
        ({"generation_config.json": {"eos_token_id": [1, 2]}}, None, "'<|end_of_text|>' and '<|eot_id|>'"),
        ({}, "<|nope|>", "has no token '<|nope|>', which --end-of-text says"),
        ({"tokenizer_config.json": {"eos_token": "<x>"}}, None, "no token '<x>', which tokenizer_config.json says"),
    ],
)
def test_an_end_of_text_that_is_not_known_is_asked_for(
    gpt2: Path, tmp_path: Path, files: dict, end: str | None, message: str
) -> None:
    shutil.copy(gpt2 / "tokenizer.json", tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path, end_of_text=end)
    assert message in caught.value.message and "--end-of-text" in caught.value.hint


def test_files_that_are_no_tokenizer_are_named(tmp_path: Path, tokenizer_folder: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": 1}')
    with pytest.raises(DataError, match=r"tokenizer.json is not a tokenizer of the library tokenizers"):
        load_tokenizer(tmp_path, end_of_text="x")
    (tmp_path / "tokenizer.json").rename(tmp_path / "vocab.json")
    with pytest.raises(DataError, match="holds vocab.json, which does not say how text is cut") as caught:
        load_tokenizer(tmp_path)
    assert "save_pretrained" in caught.value.hint
    with pytest.raises(DataError, match="--end-of-text has no effect on .*tokenizer.model"):
        load_tokenizer(tokenizer_folder, end_of_text="</s>")


def test_a_byte_level_tokenizer_is_trained_and_loses_nothing(tmp_path: Path, make_documents) -> None:
    for name in ("one", "two"):
        train_tokenizer(make_documents(30), tmp_path / name, vocab_size=320, kind="byte-bpe")
    one, two = load_tokenizer(tmp_path / "one"), load_tokenizer(tmp_path / "two")
    assert one.fingerprint == two.fingerprint and one.vocab_size == 320 and one.eos_id == 0
    assert one.losses() == [] and one.eos_token == "<|endoftext|>"
    for text in odd_strings(300):
        ids = one.encode(text)
        assert one.decode(ids) == text and one.eos_id not in ids
    assert len(one.encode(" token")) == 1
    for size, message in ((50_000, "too large"), (200, "too small: .* need 257")):
        with pytest.raises(DataError, match=message):
            train_tokenizer(make_documents(5), tmp_path / "no", vocab_size=size, kind="byte-bpe")


def test_a_vocabulary_of_150k_is_prepared_and_read(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    library = Library(models.WordLevel({f"w{n}": n for n in range(151_669)}, unk_token="w0"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path, end_of_text="w151668")
    texts = [f"w{65_000 + n} w{151_000 + n} w7" for n in range(600)]
    documents = [Document(text, text) for text in texts]
    prepare(documents, tokenizer, tmp_path / "data", validation=0)
    data = PreparedData(tmp_path / "data")
    assert data.index.dtype == "<u4" and data.index.vocab_size == 151_669
    found = sorted(int(document[1]) for document in data.splits["train"].documents())
    assert found == list(range(151_000, 151_600))
    assert np.concatenate(list(data.splits["train"].documents())).max() == tokenizer.eos_id == 151_668


def test_what_is_lost_of_a_text_is_counted(tmp_path: Path) -> None:
    make_tokenizer("wordpiece", TEXT.splitlines(), tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    lost = RoundTrip(tokenizer)
    for text in ("memory", "Memory\n\n\n", "\U0001f642"):
        lost.add(text, tokenizer.encode(text))
    assert (lost.num_checked, lost.num_changed, lost.num_unknown) == (3, 2, 1)
    assert lost.lost == {"M": 1, "\n": 3, "\U0001f642": 1}
    assert lost.lost_share == (1 + 3 + 4) / (6 + 9 + 4)
    assert "2 come back changed, 42 % of the bytes are lost; line end 3, M 1, " in lost.sentence()
    assert lost.sentence().endswith("of all tokens are unknown")
    kept = RoundTrip(load_tokenizer(tmp_path))
    for _ in range(132):
        kept.add("memory", tokenizer.encode("memory"))
    assert kept.sentence() == "102 of 132 documents decoded, all unchanged"
