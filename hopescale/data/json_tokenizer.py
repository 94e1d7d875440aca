"""Tokenizers as Hugging Face keeps them: a `tokenizer.json`, run by the library `tokenizers`, and its settings."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from hopescale.common.errors import DataError
from hopescale.data.tokenizer import JSON_FILE, SETTINGS_FILE, Tokenizer, ids_to_decode

TEMPLATE_FILE = "chat_template.jinja"
_KEPT = ("chat_template", "model_max_length", "pad_token", "unk_token", "eos_token", "split_special_tokens")
"""Settings that are kept with the tokenizer: those that users of a model read, and those that decide ids."""
_NO_IDS = ("truncation", "padding", "post_processor")
"""Parts of a `tokenizer.json` that do not decide the ids of a text: documents are not cut, padded or framed."""
_NAMES_TOKEN = (SETTINGS_FILE, "special_tokens_map.json")
_NAMES_ID = ("generation_config.json", "config.json")
_MOST_NAMED = 12


class JsonTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`: its ids are `Tokenizer.encode(text, add_special_tokens=False).ids`.

    Args:
        content: Bytes of a `tokenizer.json`.
        settings: Settings as in a `tokenizer_config.json`. `eos_token` ends a text; with `split_special_tokens` a
            special token that a text spells out is text.
        name: Name in messages.
        origin: Place that names the end of text.

    Raises:
        DataError: If the file is damaged, or has no such token.
    """

    kind = JSON_FILE

    def __init__(self, content: bytes, settings: Mapping[str, Any], name: str = JSON_FILE, origin: str = SETTINGS_FILE):
        import tokenizers

        try:
            library = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises Exception itself
            raise DataError(f"{name} is not a tokenizer of the library tokenizers: {error}", "fetch it again") from None
        library.no_truncation()
        library.no_padding()
        token = _token_text(settings["eos_token"])
        if (end := library.token_to_id(token)) is None:
            hint = f"name another: --end-of-text; special tokens are {_special_tokens(library)}"
            raise DataError(f"{name} has no token {token!r}, which {origin} says ends a text", hint)
        self.settings = {key: settings[key] for key in _KEPT if settings.get(key) is not None} | {"eos_token": token}
        library.encode_special_tokens = bool(settings.get("split_special_tokens"))
        vocab = library.get_vocab(with_added_tokens=True)
        self.name, self.eos_id, self.eos_token, self.eos_origin = name, end, token, origin
        self.vocab_size = max(vocab.values()) + 1
        self._content, self._library = content, library
        model = self._tree["model"]
        self.unk_id = model.get("unk_id") if "unk_id" in model else vocab.get(model.get("unk_token"))
        runs_of_bytes = "ByteFallback" in _types_of(self._tree.get("decoder"))
        byte = re.compile("<0x[0-9A-Fa-f]{2}>")
        self._bytes = {id for token, id in vocab.items() if runs_of_bytes and byte.fullmatch(token)}

    @classmethod
    def of_folder(
        cls, file: Path, content: bytes, end_of_text: str | None, split_special_tokens: bool | None
    ) -> JsonTokenizer:
        """Make a tokenizer of a file's content and of the settings in its folder, which the arguments override.

        Raises:
            DataError: If it is damaged, or nothing says which token ends a text.
        """
        settings = _read(file.with_name(SETTINGS_FILE))
        template = file.with_name(TEMPLATE_FILE)
        if "chat_template" not in settings and template.exists():
            settings["chat_template"] = template.read_text(encoding="utf-8")
        if split_special_tokens is not None:
            settings["split_special_tokens"] = split_special_tokens
        token, origin = (end_of_text, "--end-of-text") if end_of_text else _end_of_text(file, content)
        return cls(content, settings | {"eos_token": token}, str(file), origin)

    @cached_property
    def _tree(self) -> dict[str, Any]:
        return json.loads(self._content)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of all that decides ids: an export, which frames texts, has the same."""
        deciding = {key: part for key, part in self._tree.items() if key not in _NO_IDS}
        ids = [deciding, self.eos_token, self._library.encode_special_tokens]
        return hashlib.sha256(json.dumps(ids, sort_keys=True).encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """Turn texts into ids, each as `encode` does; more than one thread are as many as there are cores."""
        try:
            if num_threads > 1:
                encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
            else:
                encodings = (self._library.encode(text, add_special_tokens=False) for text in texts)
            return [encoding.ids for encoding in encodings]
        except (UnicodeEncodeError, TypeError):
            raise DataError("text is not valid Unicode: it holds half a surrogate pair") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Turn ids into text; the end of text and ids that the vocabulary lacks give nothing, other marks themselves.

        Raises:
            ValueError: If an id is negative.
        """
        shown = [id for id in ids_to_decode(ids, self.vocab_size) if id != self.eos_id]
        return self._library.decode(shown, skip_special_tokens=False)

    def is_open(self, id: int) -> bool:
        """Tell whether an id is a byte of a run, which is text only if all of it is, or nothing, within such a run."""
        return bool(self._bytes) and (id in self._bytes or id == self.eos_id or id >= self.vocab_size)

    def copy_to(self, folder: str | Path) -> list[Path]:
        """Write `tokenizer.json` as it was read, and its settings; return their paths."""
        paths = [Path(folder) / JSON_FILE, Path(folder) / SETTINGS_FILE]
        settings = {**self.settings, "tokenizer_class": "PreTrainedTokenizerFast"}
        paths[0].write_bytes(self._content)
        paths[1].write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return paths


def _end_of_text(file: Path, content: bytes) -> tuple[str, str]:
    """Find the token that ends a text, and the file that names it: by its text, or by its id.

    Raises:
        DataError: If none or several do; names the tokens there are.
    """
    for name in _NAMES_TOKEN:
        if token := _token_text(_read(file.with_name(name)).get("eos_token")):
            return token, name
    hint = "name it: --end-of-text TOKEN"
    import tokenizers

    try:
        library = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises Exception itself
        raise DataError(f"{file} is not a tokenizer of the library tokenizers: {error}", "fetch it again") from None
    for name in _NAMES_ID:
        found = _read(file.with_name(name)).get("eos_token_id")
        tokens = [library.id_to_token(id) for id in (found if isinstance(found, list) else [found]) if id is not None]
        if len(tokens) > 1:
            listed = " and ".join(map(repr, tokens))
            raise DataError(f"{file.with_name(name)} names several tokens that end a text: {listed}", hint)
        if tokens and tokens[0] is not None:
            return tokens[0], name
    message = f"nothing beside {file} says which token ends a text; its special tokens are {_special_tokens(library)}"
    raise DataError(message, hint)


def _special_tokens(library: Any) -> str:
    names = [repr(token.content) for token in library.get_added_tokens_decoder().values() if token.special]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return (", ".join(names[:_MOST_NAMED]) or "none") + more


def _token_text(token: Any) -> str | None:
    """Return a token as settings write it: its text, or an object that holds the text."""
    return token.get("content") if isinstance(token, dict) else token


def _read(file: Path) -> dict[str, Any]:
    """Read a JSON object; a file that is missing is an empty one."""
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}", "fetch it again") from error
    return content if isinstance(content, dict) else {}


def _types_of(part: Any) -> set[str]:
    """Return the types of a part of a `tokenizer.json`, and of the parts that it is put together of."""
    if not isinstance(part, dict):
        return set()
    inner = part.get("decoders", [])
    return {part.get("type", "")}.union(*map(_types_of, inner))
