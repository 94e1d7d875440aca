"""From a record, such as a line of JSON or a row of a table, to the text of one document."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from hopescale.common.errors import ConfigError, DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """One text and the place it came from, as `file` or `file:line`."""

    text: str
    where: str


class UndecodableError(DataError):
    """A file or a record that is no valid Unicode."""


@dataclass(frozen=True)
class RecordRules:
    """How records become texts.

    Args:
        text_key: Key of the text, where there is no template.
        template: Text in which `{key}` stands for a record's value, `{{` for a brace; null takes the text alone.
        on_undecodable: Listener for the names of lines that are not UTF-8 and are left out; null refuses them.

    Raises:
        ConfigError: From `keys` and all that needs them, if the template is none.
    """

    text_key: str = "text"
    template: str | None = None
    on_undecodable: Callable[[str], None] | None = None

    @cached_property
    def _parts(self) -> list[tuple[str, str | None]]:
        """Literal texts of the template, each with the key that follows it."""
        try:
            parts = list(string.Formatter().parse(self.template or ""))
        except ValueError as error:
            message = f"--template {self.template!r}: {error}"
            raise ConfigError(message, "write a brace of the text as {{ or }}") from None
        if any(spec or conversion or key == "" for _, key, spec, conversion in parts):
            raise ConfigError(f"--template {self.template!r} holds more than keys in braces", "write {key}, no formats")
        if not any(key for _, key, _, _ in parts):
            message = f"--template {self.template!r} names no key"
            raise ConfigError(message, "put keys in braces: '{title}: {body}'")
        return [(literal, key) for literal, key, _, _ in parts]

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Keys that a record must have."""
        if self.template is None:
            return (self.text_key,)
        return tuple(dict.fromkeys(key for _, key in self._parts if key is not None))

    def fits(self, record: Any) -> bool:
        """Tell whether something is a record with these keys, and with text under the key of the text."""
        if not isinstance(record, dict) or not all(key in record for key in self.keys):
            return False
        return self.template is not None or isinstance(record[self.text_key], str | None)

    def text_of(self, record: Any, where: str, kind: str = "line") -> str:
        """Return the text of a record; a null is empty.

        Raises:
            DataError: If a key is missing, or has no value that is a text or, in a template, a number.
        """
        for key in self.keys:
            if not isinstance(record, Mapping) or key not in record:
                raise _no_text(key, record, where, kind)
        if self.template is None:
            text = "" if record[self.text_key] is None else record[self.text_key]
            if not isinstance(text, str):
                raise _no_text(self.text_key, record, where, kind)
        else:
            values = {key: _written(record[key], key, where) for key in self.keys}
            text = "".join(literal + ("" if key is None else values[key]) for literal, key in self._parts)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            message = f"{where}: half a surrogate pair at character {error.start}"
            hint = "repair the line, or leave out what is no text: --skip-undecodable"
            raise UndecodableError(message, hint) from None
        return text

    def taken(self, where: str, read: Callable[[], str]) -> Iterator[Document]:
        """Give the document that `read` makes, alone; nothing if it is not UTF-8 and left out, or white space."""
        try:
            text = read()
        except UndecodableError:
            if self.on_undecodable is None:
                raise
            self.on_undecodable(where)
            return
        if text and not text.isspace():
            yield Document(text, where)


def _no_text(key: str, record: Any, where: str, kind: str) -> DataError:
    found = f"the keys {', '.join(map(repr, record))}" if isinstance(record, Mapping) else "no object"
    if isinstance(record, Mapping) and key in record:
        found = f"{json.dumps(record[key], default=str)[:40]} there"
    message = f"{where}: no text under the key {key!r}; the {kind} has {found}"
    return DataError(message, hint="name the key with --text-key, or several in a --template")


def _written(value: Any, key: str, where: str) -> str:
    if isinstance(value, list | dict | bytes):
        message = f"{where}: {key!r} holds a {type(value).__name__}, which a template cannot write"
        raise DataError(message, "write its parts as columns of their own")
    return "" if value is None else str(value)


def decode(data: bytes, where: str) -> str:
    """Read UTF-8, without the mark of byte order at its beginning.

    Raises:
        DataError: If it is something else.
    """
    try:
        return data.removeprefix(BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError as error:
        message = f"{where}: not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start})"
        hint = "convert to UTF-8, or leave out files with --exclude or --pattern, or all such with --skip-undecodable"
        raise UndecodableError(message, hint) from None
