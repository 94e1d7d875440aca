"""Text to token ids and back: the interface of every tokenizer, and loading from a file or a folder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

from hopescale.common.errors import DataError

SENTENCEPIECE_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
"""Beside a `tokenizer.json`: which of its tokens ends a text, and whether special tokens in a text are tokens."""

_TRAIN = "train one: hopescale data tokenizer"
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

    @staticmethod
    def load(
        path: str | Path, *, end_of_text: str | None = None, split_special_tokens: bool | None = None
    ) -> Tokenizer:
        """Read a file, or the tokenizer of a folder: a SentencePiece model, or a `tokenizer.json` with its settings.

        Args:
            path: A `.model` or `.json` file, or a folder that holds `tokenizer.model` or else `tokenizer.json`.
            end_of_text: Token of a `tokenizer.json` that ends a text; None takes the one its folder names.
            split_special_tokens: Whether a special token that a text spells out is text; None is as the folder says.

        Raises:
            DataError: If there is no tokenizer, or it is damaged, or nothing says which token ends a text.
        """
        from hopescale.data.json_tokenizer import JsonTokenizer
        from hopescale.data.sentencepiece_tokenizer import SentencePieceTokenizer

        file = _file_of(Path(path))
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read tokenizer {file}: {error.strerror}", _TRAIN) from error
        if content.lstrip()[:1] == b"{":
            return JsonTokenizer.of_folder(file, content, end_of_text, split_special_tokens)
        tokenizer = SentencePieceTokenizer(content, str(file))
        given = {"--end-of-text": end_of_text is not None, "--split-special-tokens": split_special_tokens is not None}
        if without_effect := [option for option, is_given in given.items() if is_given]:
            message = f"{' and '.join(without_effect)} has no effect on {file}"
            raise DataError(message, "a SentencePiece model has an end-of-text piece, and spells it as any text")
        return tokenizer

    @staticmethod
    def find(folder: Path) -> Tokenizer | None:
        """Load the tokenizer that was kept in a folder, if one was.

        Raises:
            DataError: If it is damaged.
        """
        return Tokenizer.load(folder) if any((folder / n).exists() for n in (SENTENCEPIECE_FILE, JSON_FILE)) else None

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
        """Write the files into a folder from which `load` reads the same tokenizer; return their paths."""

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


def _file_of(path: Path) -> Path:
    """Return the file of a tokenizer; of a folder with both kinds the SentencePiece model, which the other is made of.

    Raises:
        DataError: If a folder holds the files of another kind.
    """
    if not path.is_dir():
        return path
    model, fast = path / SENTENCEPIECE_FILE, path / JSON_FILE
    if fast.exists() and (not model.exists() or not _is_sentencepiece(model)):
        return fast
    slow = [name for name in ("vocab.json", "vocab.txt", "tiktoken.model") if (path / name).exists()]
    if slow and not model.exists():
        message = f"{path} holds {slow[0]}, which does not say how text is cut, and no {JSON_FILE}"
        code = f"AutoTokenizer.from_pretrained({str(path)!r}).save_pretrained(FOLDER)"
        raise DataError(message, f"let transformers write one: {code}")
    return model


def _is_sentencepiece(file: Path) -> bool:
    """Tell a SentencePiece model from other files of that name, such as lists of byte pairs in base64."""
    with file.open("rb") as stream:
        return stream.read(1) == b"\n"  # the first field of the message: a piece
