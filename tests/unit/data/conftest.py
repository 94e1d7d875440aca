from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hopescale.data.load_tokenizer import load_tokenizer
from hopescale.data.prepare import prepare
from hopescale.data.records import Document
from hopescale.data.tokenizer import Tokenizer
from hopescale.data.train_tokenizer import train_tokenizer
from tests.support.s3 import serve_bucket

WORDS = ("def", "return", "memory", "level", "self", "for", "in", "range", "token", "state", "key", "value")


def _documents(count: int, *, seed: int = 0, longest: int = 60) -> list[Document]:
    draw = random.Random(seed)
    texts = (
        f"# document {seed}.{number}\n"
        + "".join(
            "    " * draw.randrange(3) + " ".join(draw.choices(WORDS, k=draw.randint(1, 8))) + ":\n"
            for _ in range(draw.randint(1, longest))
        )
        for number in range(count)
    )
    return [Document(text, f"made:{number}") for number, text in enumerate(texts)]


@pytest.fixture(scope="session")
def make_documents() -> Callable[..., list[Document]]:
    """Give `count` distinct indented texts of very different lengths."""
    return _documents


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tok"
    train_tokenizer(_documents(60), folder, vocab_size=330)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    return load_tokenizer(tokenizer_folder)


@pytest.fixture
def make_data(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Prepare a data set of several small shards, whose blocks hold few documents each."""
    monkeypatch.setattr("hopescale.data.prepare.BLOCK_TOKENS", 500)

    def make(name: str = "data", documents: list[Document] | None = None, **options) -> Path:
        settings = {"validation": 0.1, "shard_bytes": 6000} | options
        prepare(_documents(60) if documents is None else documents, tokenizer, tmp_path / name, **settings)
        return tmp_path / name

    return make


@pytest.fixture
def s3_bucket() -> Iterator[str]:
    """Give the address of an empty bucket of a local S3 server."""
    with serve_bucket() as address:
        yield address
