"""A SentencePiece model as a `tokenizer.json`, which transformers loads without sentencepiece."""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from hopescale.checkpoint.manifest import TOKENIZER

_SPACE = "\u2581"
_SAMPLES = (
    "A plain sentence, with numbers 1234 and 5.6e-7.",
    "  leading,  double and trailing spaces \n\n\tand tabs\r\n",
    "Größe, naïve, 漢字, Привет, 🙂, \x00 and e\u0301.",
    "def f(x):\n    return {'a': [x ** 2]}  # code\n",
)


def write_tokenizer(folder: Path) -> str:
    """Write `tokenizer.json` and its config beside the `tokenizer.model` of a folder, if it can be done exactly.

    Returns:
        A sentence for the model card.
    """
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / TOKENIZER))
    fast = _build(processor)
    same = fast is not None and all(
        fast.encode(text, add_special_tokens=False).ids == processor.encode(text)
        and fast.decode(processor.encode(text)) == processor.decode(processor.encode(text))
        for text in _SAMPLES
    )
    if not same:
        return (
            "Its tokenizer is the SentencePiece model `tokenizer.model`, which splits or normalises text in a way that "
            "`tokenizer.json` cannot; load it with sentencepiece instead of `AutoTokenizer`."
        )
    end = processor.id_to_piece(processor.eos_id())
    fast.post_processor = processors.TemplateProcessing(
        single=f"{end} $A", pair=f"{end} $A {end} $B", special_tokens=[(end, processor.eos_id())]
    )
    fast.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "unk_token": processor.id_to_piece(processor.unk_id()),
        "pad_token": end,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return f"The tokenizer puts `{end}` before a text, as every text of the training data has it."


def _build(processor: sentencepiece.SentencePieceProcessor) -> Tokenizer | None:
    """Build a BPE of the same pieces and priorities; None if a piece that is spelled in bytes is missing."""
    pieces = [processor.id_to_piece(number) for number in range(processor.vocab_size())]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    if "<0x00>" not in vocab:
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
    fast = Tokenizer(BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefixed = processor.encode("a", out_type=str)[0].startswith(_SPACE)
    spaces = [normalizers.Prepend(_SPACE)] * prefixed + [normalizers.Replace(" ", _SPACE)]
    fast.normalizer = normalizers.Sequence(spaces)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*steps, *[decoders.Strip(" ", 1, 0)] * prefixed])
    fast.add_special_tokens([pieces[number] for number in special])
    return fast
