"""Load a tokenizer of either kind from a file or a folder."""

from __future__ import annotations

from pathlib import Path

from hopescale.common.errors import DataError
from hopescale.data.json_tokenizer import JsonTokenizer
from hopescale.data.sentencepiece_tokenizer import SentencePieceTokenizer
from hopescale.data.tokenizer import JSON_FILE, SENTENCEPIECE_FILE, Tokenizer


def load_tokenizer(
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
    file = _file_of(Path(path))
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read tokenizer {file}: {error.strerror}", "train one: hopescale data tokenizer"
        ) from error
    if content.lstrip()[:1] == b"{":
        return JsonTokenizer.of_folder(file, content, end_of_text, split_special_tokens)
    tokenizer = SentencePieceTokenizer(content, str(file))
    given = {"--end-of-text": end_of_text is not None, "--split-special-tokens": split_special_tokens is not None}
    if without_effect := [option for option, is_given in given.items() if is_given]:
        message = f"{' and '.join(without_effect)} has no effect on {file}"
        raise DataError(message, "a SentencePiece model has an end-of-text piece, and spells it as any text")
    return tokenizer


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """Load the tokenizer that was kept in a folder, if one was.

    Raises:
        DataError: If it is damaged.
    """
    return load_tokenizer(folder) if any((folder / n).exists() for n in (SENTENCEPIECE_FILE, JSON_FILE)) else None


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
