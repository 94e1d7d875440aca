"""The SentencePiece model of training, for one that normalises or splits text as no `tokenizer.json` can."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import PreTrainedTokenizer

SPACE = "\u2581"  # how sentencepiece writes a space inside a piece


class HopeTokenizer(PreTrainedTokenizer):
    """Texts to the ids that training saw, and back, by sentencepiece itself.

    Marks such as `</s>` in a text are spelled in characters, as in training.

    Args:
        vocab_file: Path of the SentencePiece model.
        **kwargs: What every tokenizer of transformers has.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model"}
    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, vocab_file: str, **kwargs: Any):
        self.vocab_file = vocab_file
        self.processor = sentencepiece.SentencePieceProcessor(model_file=vocab_file)
        bytes_of_space = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        exact = self.processor.encode("a", out_type=str) == ["a"] and self.processor.is_byte(bytes_of_space[0])
        self.bytes_of_space = bytes_of_space if exact else None
        super().__init__(**{"split_special_tokens": True, "special_tokens_pattern": "bos", **kwargs})

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self.processor.vocab_size()

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each piece."""
        own = {self.processor.id_to_piece(number): number for number in range(self.vocab_size)}
        return own | self.added_tokens_encoder

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Cut a text into pieces, as training does: a space symbol in it is spelled in bytes if nothing may be lost."""
        ids: list[int] = []
        for part in [text] if self.bytes_of_space is None else re.split(f"({SPACE})", text):
            ids += self.bytes_of_space if self.bytes_of_space and part == SPACE else self.processor.encode(part)
        return [self.processor.id_to_piece(number) for number in ids]

    def _convert_token_to_id(self, token: str) -> int:
        return self.processor.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.processor.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces to a text."""
        return self.processor.decode(tokens)

    def _decode(self, token_ids: int | Iterable[int], skip_special_tokens: bool = False, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        special, texts = self.added_tokens_decoder, []
        for is_special, run in groupby(ids, special.__contains__):
            if not is_special:
                texts.append(self.processor.decode(list(run)))
            elif not skip_special_tokens:
                texts += [special[number].content for number in run]
        return "".join(texts)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Copy the model into a folder, and return its path."""
        name = "-".join(filter(None, [filename_prefix, self.vocab_files_names["vocab_file"]]))
        path = Path(save_directory, name)
        if path.resolve() != Path(self.vocab_file).resolve():
            shutil.copy(self.vocab_file, path)
        return (str(path),)
