"""Five kinds of `tokenizer.json`, as families of models have them, each trained on a little text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

KINDS = ("gpt2", "llama3", "llama2", "unigram", "wordpiece")
_DIGITS = r"\p{N}{1,3}|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def make_tokenizer(kind: str, texts: Sequence[str], folder: Path, *, vocab_size: int = 500) -> Tokenizer:
    """Train a tokenizer, and write `tokenizer.json` and `tokenizer_config.json` into a folder that is made."""
    library, end = _KINDS[kind](texts, vocab_size)
    library.add_tokens(["<think>"])
    library.enable_truncation(8)  # as some are saved, and no document may be cut by it
    folder.mkdir(parents=True, exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    config = {"eos_token": {"content": end} if kind == "gpt2" else end, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _train(library: Tokenizer, trainer: type, texts: Sequence[str], vocab_size: int, special: list[str], **settings):
    settings = {"vocab_size": vocab_size, "special_tokens": special, "show_progress": False} | settings
    library.train_from_iterator(texts, trainer(**settings))


def _gpt2(texts: Sequence[str], vocab_size: int) -> tuple[Tokenizer, str]:
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    _train(library, trainers.BpeTrainer, texts, vocab_size, ["<|endoftext|>"], **alphabet)
    return library, "<|endoftext|>"


def _llama3(texts: Sequence[str], vocab_size: int) -> tuple[Tokenizer, str]:
    """Bytes, words cut by a pattern, whole words first, a begin of text; with NFC, as Qwen has it."""
    library = Tokenizer(models.BPE(ignore_merges=True))
    library.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(_DIGITS), behavior="isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    library.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    alphabet = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    _train(library, trainers.BpeTrainer, texts, vocab_size, special, **alphabet)
    begin = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", library.token_to_id("<|begin_of_text|>"))]
    )
    library.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return library, "<|end_of_text|>"


def _llama2(texts: Sequence[str], vocab_size: int) -> tuple[Tokenizer, str]:
    """Characters with a space before the text, and bytes for those that are missing."""
    library = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    replace = decoders.Replace("\u2581", " ")
    library.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    _train(library, trainers.BpeTrainer, texts, vocab_size, special, limit_alphabet=60)
    tree = json.loads(library.to_str())
    tree["added_tokens"] = tree["added_tokens"][:3]  # the bytes are pieces, no tokens of their own
    return Tokenizer.from_str(json.dumps(tree)), "</s>"


def _unigram(texts: Sequence[str], vocab_size: int) -> tuple[Tokenizer, str]:
    library = Tokenizer(models.Unigram())
    spaces = normalizers.Replace(Regex(" {2,}"), " ")
    library.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), spaces])
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    _train(library, trainers.UnigramTrainer, texts, vocab_size, ["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    return library, "</s>"


def _wordpiece(texts: Sequence[str], vocab_size: int) -> tuple[Tokenizer, str]:
    library = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer()
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    _train(library, trainers.WordPieceTrainer, texts, vocab_size, special)
    marks = [(token, library.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    library.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    return library, "[SEP]"


_KINDS = {"gpt2": _gpt2, "llama3": _llama3, "llama2": _llama2, "unigram": _unigram, "wordpiece": _wordpiece}
