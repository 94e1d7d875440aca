"""Text to token ids and back, by a sentencepiece model that loses nothing; how such a model is trained."""

from __future__ import annotations

import hashlib
import heapq
import io
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from hopescale.common.disk import staged_folder
from hopescale.common.errors import DataError
from hopescale.data.text import Document

MODEL_FILE = "tokenizer.model"

_SPACE_SYMBOL = "\u2581"  # how sentencepiece writes a space inside a piece
_SPAN = 1 << 20  # characters encoded at a time; bounds memory for documents of any length
_CHUNK = 4096  # characters per training sentence
_MAX_SENTENCE_BYTES = 4 * _CHUNK
_READ_FACTOR = 50  # text read per byte of the training sample, at most

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


class Tokenizer:
    """A sentencepiece model. One trained by `train_tokenizer` satisfies `decode(encode(x)) == x` for every text."""

    def __init__(self, model: bytes, name: str = MODEL_FILE):
        """Load a serialised model; messages call it `name`.

        Raises:
            DataError: If it is not a sentencepiece model or has no end-of-text piece.
        """
        processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = bool(model) and processor.load_from_serialized_proto(model)
        except (RuntimeError, ValueError):
            loaded = False
        if not loaded or processor.vocab_size() == 0:
            raise DataError(f"{name} is not a sentencepiece model", hint="train one: hopescale data tokenizer")
        if processor.eos_id() < 0:
            raise DataError(f"{name} has no end-of-text piece, which must follow every document")
        self._model = model
        self._processor = processor
        self._space_symbol = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_SYMBOL.encode()]
        self._exact = processor.encode("a", out_type=str) == ["a"] and processor.is_byte(self._space_symbol[0])

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `.model` file, or `tokenizer.model` of a folder.

        Raises:
            DataError: If there is no such file or it is not a sentencepiece model.
        """
        file = Path(path) / MODEL_FILE if Path(path).is_dir() else Path(path)
        try:
            return cls(file.read_bytes(), str(file))
        except OSError as error:
            hint = "train one: hopescale data tokenizer"
            raise DataError(f"cannot read tokenizer {file}: {error.strerror}", hint) from error

    @property
    def vocab_size(self) -> int:
        """Number of pieces; ids are below it."""
        return self._processor.vocab_size()

    @property
    def eos_id(self) -> int:
        """End-of-text id: the last token of every document, and so the one that stands before every document."""
        return self._processor.eos_id()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model file, in hexadecimal."""
        return hashlib.sha256(self._model).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Turn a text into ids, without begin or end marks.

        Raises:
            DataError: If the text is not valid Unicode.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """Turn texts into ids, each as `encode` does."""
        cut = [self._cut(text) for text in texts]
        spelled = _SPACE_SYMBOL if self._exact else None
        parts = [part for text in cut for part in text if part != spelled]
        try:
            encoded = iter(self._processor.encode(parts, out_type=int, num_threads=num_threads))
        except (UnicodeEncodeError, TypeError):
            raise DataError("text is not valid Unicode: it holds half a surrogate pair") from None
        return [
            [id for part in text for id in (self._space_symbol if part == spelled else next(encoded))] for text in cut
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text; marks of begin and end give nothing.

        Raises:
            ValueError: If an id is outside the vocabulary.
        """
        ids = [int(id) for id in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"token ids must be in [0, {self.vocab_size}), got {min(ids)} to {max(ids)}")
        return self._processor.decode(ids)

    def losses(self) -> list[str]:
        """Name what does not survive `decode(encode(text))`, of what texts usually hold."""
        return [name for name, text in _FRAGILE.items() if self.decode(self.encode(text)) != text]

    def copy_to(self, folder: str | Path) -> Path:
        """Write `tokenizer.model` into a folder and return its path."""
        path = Path(folder) / MODEL_FILE
        path.write_bytes(self._model)
        return path

    def _cut(self, text: str) -> list[str]:
        """Split where that cannot lose anything: long texts at line ends, and around the space symbol.

        A model that puts a space before every text would put one before every part, so its texts stay whole.
        """
        if not self._exact or (len(text) <= _SPAN and _SPACE_SYMBOL not in text):
            return [text]
        parts = [part for part in re.split(f"({_SPACE_SYMBOL})", text) if part]
        return [span for part in parts for span in _spans(part, _SPAN)]


@dataclass(frozen=True)
class TokenizerSummary:
    """What `train_tokenizer` did. Sizes in bytes of UTF-8."""

    vocab_size: int
    read_bytes: int
    sample_bytes: int
    bytes_per_token: float
    """Of the sample."""


def train_tokenizer(
    documents: Iterable[Document],
    out: str | Path,
    *,
    vocab_size: int,
    sample_bytes: int = 8_000_000,
) -> TokenizerSummary:
    """Train a BPE tokenizer on a random sample of the documents and write it to the folder `out`.

    Text is taken as it is: no normalisation, white space and line ends kept; what the vocabulary lacks is spelled in
    bytes. Ids: 0 unknown (never produced), 1 end of text, no begin of text. The same documents give the same file.

    Args:
        documents: Text to learn from. Reading ends after 50 times the sample.
        out: Folder to create.
        vocab_size: Number of pieces, of which 258 are bytes and marks.
        sample_bytes: Size of the sample in bytes; bounds time and memory.

    Raises:
        DataError: If there is no text, or not enough of it for the vocabulary, or `out` cannot be written.
    """
    out = Path(out)
    with staged_folder(out) as folder:
        chunks, read_bytes = _sample(documents, sample_bytes)
        if not chunks:
            raise DataError("no text to train a tokenizer on", hint="check the inputs; white space does not count")
        tokenizer = Tokenizer(_train(chunks, vocab_size))
        tokenizer.copy_to(folder)
        size = sum(len(chunk.encode()) for chunk in chunks)
        num_tokens = sum(map(len, tokenizer.encode_batch(chunks)))
    return TokenizerSummary(tokenizer.vocab_size, read_bytes, size, size / num_tokens)


def _train(chunks: list[str], vocab_size: int) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(chunks),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=_MAX_SENTENCE_BYTES,
            unk_id=0,
            bos_id=-1,
            eos_id=1,
            pad_id=-1,
            num_threads=1,  # the model records it, and must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size, sum(map(len, chunks))) from None
    return model.getvalue()


def _training_error(reason: str, vocab_size: int, num_characters: int) -> DataError:
    most = re.search(r"value <= (\d+)", reason)
    least = re.search(r"required_chars\. \d+ vs (\d+)", reason)
    have = f"the sample of {num_characters:,} characters"
    if most:
        message = f"vocab size {vocab_size} is too large: {have} has only {most[1]} pieces"
        return DataError(message, f"use at most {most[1]}, or give more text")
    if least:
        message = f"vocab size {vocab_size} is too small: bytes, marks and frequent characters alone need {least[1]}"
        return DataError(message, f"use more than {least[1]}")
    return DataError(f"cannot train a tokenizer of {vocab_size} pieces on {have}: {reason}")


def _sample(documents: Iterable[Document], budget: int) -> tuple[list[str], int]:
    """Draw a uniform sample of chunks from what is read; return it in reading order, and the bytes read."""
    draw = random.Random(0)
    kept: list[tuple[float, int, int, str]] = []  # a heap that loses its largest draw first
    kept_bytes = read_bytes = 0
    for number, chunk in enumerate(chunk for document in documents for chunk in _spans(document.text, _CHUNK)):
        size = len(chunk.encode())
        read_bytes += size
        heapq.heappush(kept, (-draw.random(), number, size, chunk))
        kept_bytes += size
        while kept_bytes > budget and len(kept) > 1:
            kept_bytes -= heapq.heappop(kept)[2]
        if read_bytes >= _READ_FACTOR * budget:
            break
    return [chunk for _, _, _, chunk in sorted(kept, key=lambda item: item[1])], read_bytes


def _spans(text: str, size: int) -> Iterator[str]:
    """Cut a text into parts of at most `size` characters, after a line end where there is one."""
    start = 0
    while len(text) - start > size:
        cut = text.rfind("\n", start, start + size) + 1
        stop = cut if cut > start else start + size
        yield text[start:stop]
        start = stop
    if start < len(text) or not text:
        yield text[start:]
