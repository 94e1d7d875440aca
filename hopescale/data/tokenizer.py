"""Text to token ids and back: the interface of every tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

SENTENCEPIECE_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
"""Beside a `tokenizer.json`: which of its tokens ends a text, and whether special tokens in a text are tokens."""

_FRAGILE = {
    "line ends": "a\nb",
    "tabs": "a\tb",
    "runs of spaces": "a  b",
    "spaces at the beginning": " a",
    "capital letters": "aB",
    "ligatures and other forms of letters": "\ufb01\u2163",
    "characters that it has no piece for": "\u6f22\U0001f642",
}
"""Short texts that a tokenizer may change, by what they stand for."""


class Tokenizer(ABC):
    """Texts to ids and back. One that `data tokenizer` has trained satisfies `decode(encode(x)) == x` for every text.

    Attributes:
        name: Name of its file in messages.
        kind: Word for its kind.
        vocab_size: Number that all ids are below.
        eos_id: End-of-text id: the last token of every document, and so the one that stands before every document.
        eos_token: The same as it is written.
        eos_origin: Place that names it.
        unk_id: Id of text that the vocabulary lacks; None if there is none.
        fingerprint: SHA-256, in hexadecimal, of all that decides ids.
    """

    name: str
    kind: str
    vocab_size: int
    eos_id: int
    eos_token: str
    eos_origin: str
    unk_id: int | None
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids, without begin or end marks.

        Raises:
            DataError: If the text is not valid Unicode.
        """
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """Turn texts into ids, each as `encode` does."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text; the end of text and ids that the vocabulary lacks give nothing.

        Raises:
            ValueError: If an id is negative.
        """

    @abstractmethod
    def is_open(self, id: int) -> bool:
        """Tell whether the text of an id depends on the id after it, other than by a character cut in two."""

    @abstractmethod
    def copy_to(self, folder: str | Path) -> list[Path]:
        """Write the files into a folder from which `load_tokenizer` reads the same tokenizer; return their paths."""

    def losses(self) -> list[str]:
        """Name the usual parts of texts that do not survive `decode(encode(text))`."""
        return [name for name, text in _FRAGILE.items() if self.decode(self.encode(text)) != text]


def ids_to_decode(ids: Iterable[int], vocab_size: int) -> list[int]:
    """Return those ids that a vocabulary has.

    Raises:
        ValueError: If an id is negative.
    """
    ids = [int(id) for id in ids]
    if ids and min(ids) < 0:
        raise ValueError(f"token ids must not be negative, got {min(ids)}")
    return [id for id in ids if id < vocab_size]
