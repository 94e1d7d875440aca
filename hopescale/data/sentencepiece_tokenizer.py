"""SentencePiece models as tokenizers that lose nothing where the model lets them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from hopescale.common.errors import DataError
from hopescale.data.tokenizer import SENTENCEPIECE_FILE, Tokenizer, ids_to_decode

_SPACE_SYMBOL = "\u2581"  # how sentencepiece writes a space inside a piece
_SPAN = 1 << 20  # characters encoded at a time; bounds memory for documents of any length


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, kept as it is."""

    kind = "SentencePiece"

    def __init__(self, model: bytes, name: str = SENTENCEPIECE_FILE):
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
        self.name = name
        self.vocab_size = processor.vocab_size()
        self.eos_id, self.eos_origin = processor.eos_id(), SENTENCEPIECE_FILE
        self.eos_token = processor.id_to_piece(self.eos_id)
        self.unk_id = processor.unk_id()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._model = model
        self._processor = processor
        self._space_symbol = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_SYMBOL.encode()]
        self._exact = processor.encode("a", out_type=str) == ["a"] and processor.is_byte(self._space_symbol[0])

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
        """Turn ids into text; marks of begin and end, and ids that the vocabulary lacks, give nothing.

        Raises:
            ValueError: If an id is negative.
        """
        return self._processor.decode(ids_to_decode(ids, self.vocab_size))

    def is_open(self, id: int) -> bool:
        """Return False: every character of a run of bytes stands for itself."""
        return False

    def copy_to(self, folder: str | Path) -> list[Path]:
        """Write `tokenizer.model` into a folder; return its path."""
        path = Path(folder) / SENTENCEPIECE_FILE
        path.write_bytes(self._model)
        return [path]

    def _cut(self, text: str) -> list[str]:
        """Split where that cannot lose anything: long texts at line ends, and around the space symbol.

        A model that puts a space before every text would put one before every part, so its texts stay whole.
        """
        if not self._exact or (len(text) <= _SPAN and _SPACE_SYMBOL not in text):
            return [text]
        parts = [part for part in re.split(f"({_SPACE_SYMBOL})", text) if part]
        return [span for part in parts for span in spans(part, _SPAN)]


def spans(text: str, size: int) -> Iterator[str]:
    """Cut a text into parts of at most `size` characters, after a line end where there is one."""
    start = 0
    while len(text) - start > size:
        cut = text.rfind("\n", start, start + size) + 1
        stop = cut if cut > start else start + size
        yield text[start:stop]
        start = stop
    if start < len(text) or not text:
        yield text[start:]
