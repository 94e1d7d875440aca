"""How a tokenizer is trained: SentencePiece or byte-level pairs, on a random sample of the text, without loss."""

from __future__ import annotations

import heapq
import io
import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sentencepiece

from hopescale.common.disk import staged_folder
from hopescale.common.errors import DataError
from hopescale.data.json_tokenizer import JsonTokenizer
from hopescale.data.records import Document
from hopescale.data.sentencepiece_tokenizer import SentencePieceTokenizer, spans
from hopescale.data.tokenizer import Tokenizer

Kind = Literal["sentencepiece", "byte-bpe"]

END_OF_TEXT = "<|endoftext|>"
"""The one special token of a byte-level tokenizer, under the name that GPT-2 gave it."""
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Where a byte-level tokenizer cuts text into words: as GPT-4 and Qwen do, without English contractions."""

_CHUNK = 4096  # characters per training sentence
_MAX_SENTENCE_BYTES = 4 * _CHUNK
_READ_FACTOR = 50  # text read per byte of the training sample, at most


@dataclass(frozen=True)
class TokenizerSummary:
    """Result of `train_tokenizer`. Sizes in bytes of UTF-8."""

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
    kind: Kind = "sentencepiece",
) -> TokenizerSummary:
    """Train a BPE tokenizer on a random sample of the documents and write it to the folder `out`.

    Text is taken as it is: no normalisation, white space and line ends kept; what the vocabulary lacks is spelled in
    bytes. The same documents give the same file.

    Args:
        documents: Text to learn from. Reading ends after 50 times the sample.
        out: Folder to create.
        vocab_size: Number of pieces, of which 256 are bytes, and 1 or 2 are marks.
        sample_bytes: Size of the sample in bytes; bounds time and memory.
        kind: `sentencepiece` merges characters; its ids are 0 unknown (never produced) and 1 end of text.
            `byte-bpe` merges bytes within words, as GPT-2, Llama 3 and Qwen do; its id 0 is the end of text.

    Raises:
        DataError: If there is no text, or not enough of it for the vocabulary, or `out` cannot be written.
    """
    out = Path(out)
    with staged_folder(out) as folder:
        chunks, read_bytes = _sample(documents, sample_bytes)
        if not chunks:
            raise DataError("no text to train a tokenizer on", hint="check the inputs; white space does not count")
        tokenizer = _TRAINERS[kind](chunks, vocab_size)
        tokenizer.copy_to(folder)
        size = sum(len(chunk.encode()) for chunk in chunks)
        num_tokens = sum(map(len, tokenizer.encode_batch(chunks)))
    return TokenizerSummary(tokenizer.vocab_size, read_bytes, size, size / num_tokens)


def _train_sentencepiece(chunks: list[str], vocab_size: int) -> Tokenizer:
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
    return SentencePieceTokenizer(model.getvalue())


def _train_byte_bpe(chunks: list[str], vocab_size: int) -> Tokenizer:
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as LibraryTokenizer

    library = LibraryTokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([words, spelled])
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < (least := len(alphabet) + 1):
        message = f"vocab size {vocab_size} is too small: bytes and the end-of-text mark alone need {least}"
        raise DataError(message, f"use at least {least}")
    settings = {"special_tokens": [END_OF_TEXT], "initial_alphabet": sorted(alphabet), "show_progress": False}
    library.train_from_iterator(chunks, trainers.BpeTrainer(vocab_size=vocab_size, **settings))
    if (most := library.get_vocab_size()) < vocab_size:
        have = f"the sample of {sum(map(len, chunks)):,} characters has only {most} pieces"
        raise DataError(f"vocab size {vocab_size} is too large: {have}", f"use at most {most}, or give more text")
    settings = {"eos_token": END_OF_TEXT, "split_special_tokens": True}
    return JsonTokenizer(json.dumps(json.loads(library.to_str())).encode(), settings)


_TRAINERS = {"sentencepiece": _train_sentencepiece, "byte-bpe": _train_byte_bpe}


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
    """Draw a uniform sample of the chunks that are read; return it in reading order, and the bytes read."""
    draw = random.Random(0)
    kept: list[tuple[float, int, int, str]] = []  # a heap that loses its largest draw first
    kept_bytes = read_bytes = 0
    for number, chunk in enumerate(chunk for document in documents for chunk in spans(document.text, _CHUNK)):
        size = len(chunk.encode())
        read_bytes += size
        heapq.heappush(kept, (-draw.random(), number, size, chunk))
        kept_bytes += size
        while kept_bytes > budget and len(kept) > 1:
            kept_bytes -= heapq.heappop(kept)[2]
        if read_bytes >= _READ_FACTOR * budget:
            break
    return [chunk for _, _, _, chunk in sorted(kept, key=lambda item: item[1])], read_bytes
