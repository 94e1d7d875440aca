"""The tokenizer of training as one of transformers that gives the same ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, normalizers, processors
from tokenizers.models import BPE

from hopescale.data.json_tokenizer import JsonTokenizer
from hopescale.data.tokenizer import JSON_FILE, SENTENCEPIECE_FILE, SETTINGS_FILE, Tokenizer

NATIVE_TOKENIZER = "sentencepiece.model"
"""A model's name in a folder without code of ours, where transformers would convert a `tokenizer.model` wrongly."""

_SPACE = "\u2581"
_CODE = Path(__file__).with_name("hf_model") / "tokenization_hope.py"
_SAMPLES = (
    "A plain sentence, with numbers 1234 and 5.6e-7.",
    "  leading,  double and trailing spaces \n\n\tand tabs\r\n",
    "Größe, naïve, 漢字, Привет, 🙂, \x00 and e\u0301.",
    "def f(x):\n    return {'a': [x ** 2]}  # code\n",
    f"marks </s> and <unk>, <0x41>, {_SPACE} and \ufb01\u2163",
)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, own_code: bool) -> str:
    """Write the files that transformers needs into a folder, so that its ids are those of training.

    That is a `tokenizer.json`, where one gives the same ids. Else it is code of ours that calls sentencepiece, or,
    where a folder must hold none, nothing: the model gets a name by which transformers does not take it up.

    Returns:
        Sentences for the model card and the console.
    """
    tokenizer.copy_to(folder)
    end = tokenizer.eos_token
    note = f"The tokenizer puts `{end}` before a text, as every text of the training data has it."
    config = {
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if isinstance(tokenizer, JsonTokenizer):
        _frame(folder / JSON_FILE, tokenizer)
        config |= {"split_special_tokens": False} | tokenizer.settings
    else:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE_FILE))
        fast = _build(processor)
        config["unk_token"] = processor.id_to_piece(processor.unk_id())
        if not _puts_space(processor):
            config["add_prefix_space"] = False  # llama.cpp's converter takes the silence of a Llama for true
        if _is_same(fast, tokenizer):
            fast.post_processor = processors.TemplateProcessing(
                single=f"{end} $A", pair=f"{end} $A {end} $B", special_tokens=[(end, tokenizer.eos_id)]
            )
            fast.save(str(folder / JSON_FILE))
        elif own_code:
            shutil.copy(_CODE, folder)
            config |= {"tokenizer_class": "HopeTokenizer"}
            config["auto_map"] = {"AutoTokenizer": ["tokenization_hope.HopeTokenizer", None]}
            note += " It normalises or splits text as no `tokenizer.json` can, and so needs `sentencepiece`."
        else:
            (folder / SENTENCEPIECE_FILE).rename(folder / NATIVE_TOKENIZER)
            return (
                f"Its tokenizer is the SentencePiece model `{NATIVE_TOKENIZER}`, which normalises or splits text as no "
                "`tokenizer.json` can; load it with sentencepiece, since `AutoTokenizer` would give other ids."
            )
    (folder / SETTINGS_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return note


def _is_same(fast: FastTokenizer | None, ours: Tokenizer) -> bool:
    """Compare ids and texts of samples."""
    return fast is not None and all(
        fast.encode(text, add_special_tokens=False).ids == ours.encode(text)
        and fast.decode(ours.encode(text)) == ours.decode(ours.encode(text))
        for text in _SAMPLES
    )


def _frame(file: Path, tokenizer: Tokenizer) -> None:
    """Let a `tokenizer.json` put the end of text before a text, instead of its own tokens around texts."""
    tree = json.loads(file.read_text(encoding="utf-8"))
    end = {"SpecialToken": {"id": tokenizer.eos_token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    token = {"id": tokenizer.eos_token, "ids": [tokenizer.eos_id], "tokens": [tokenizer.eos_token]}
    tree["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [end, first],
        "pair": [end, first, end, second],
        "special_tokens": {tokenizer.eos_token: token},
    }
    file.write_text(json.dumps(tree, ensure_ascii=False) + "\n", encoding="utf-8")


def _puts_space(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Say whether a model puts a space before a text."""
    return processor.encode("a", out_type=str)[0].startswith(_SPACE)


def _build(processor: sentencepiece.SentencePieceProcessor) -> FastTokenizer | None:
    """Build a BPE of the same pieces and priorities; None if a piece that is spelled in bytes is missing.

    Pieces are written with spaces, so that the space symbol in a text is spelled in bytes, as in training.
    """
    pieces = [processor.id_to_piece(number).replace(_SPACE, " ") for number in range(processor.vocab_size())]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    if "<0x00>" not in vocab or len(vocab) < len(pieces):
        return None
    special = [number for number in range(len(pieces)) if processor.is_control(number) or processor.is_unknown(number)]
    plain = {piece for piece, number in vocab.items() if number not in special and not processor.is_byte(number)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(plain, key=lambda piece: (-processor.get_score(vocab[piece]), vocab[piece]))
        for cut in range(1, len(piece))
        if piece[:cut] in plain and piece[cut:] in plain
    ]
    unknown = processor.id_to_piece(processor.unk_id())
    fast = FastTokenizer(BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = _puts_space(processor)
    if prefixed:  # such a model is not exact, and takes the symbol for a space
        fast.normalizer = normalizers.Sequence([normalizers.Replace(_SPACE, " "), normalizers.Prepend(" ")])
    fast.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), *[decoders.Strip(" ", 1, 0)] * prefixed]
    )
    fast.add_special_tokens([pieces[number] for number in special])
    fast.encode_special_tokens = True
    return fast
