"""Losses of a tokenizer on real text: documents that come back changed, characters that are lost, unknown tokens."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

from hopescale.data.tokenizer import Tokenizer

_FIRST = 100
_ONE_IN = 16
_MOST_NAMED = 6


class RoundTrip:
    """Counts of documents that are encoded and decoded again, and of their losses.

    Of all documents the unknown tokens are counted; the first 100 and one in 16 of the others are decoded.

    Args:
        tokenizer: Tokenizer of the ids that `add` receives.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.num_tokens = self.num_unknown = 0
        self.num_documents = self.num_checked = self.num_changed = 0
        self.num_bytes = 0
        """Bytes of UTF-8 of the documents that were decoded."""
        self.lost: Counter[str] = Counter()
        """Characters of these that did not come back; not counted where only the order differs."""
        self._tokenizer = tokenizer

    def add(self, text: str, ids: Sequence[int]) -> None:
        """Take up a document and its ids, without the end of text."""
        self.num_documents += 1
        self.num_tokens += len(ids)
        if self._tokenizer.unk_id is not None:
            self.num_unknown += ids.count(self._tokenizer.unk_id)
        if self.num_documents > _FIRST and self.num_documents % _ONE_IN:
            return
        self.num_checked += 1
        self.num_bytes += len(text.encode())
        if (again := self._tokenizer.decode(ids)) != text:
            self.num_changed += 1
            self.lost += Counter(text) - Counter(again)

    @property
    def lost_share(self) -> float:
        """Share of the decoded documents' bytes that did not come back."""
        return sum(len(c.encode()) * count for c, count in self.lost.items()) / max(1, self.num_bytes)

    def sentence(self) -> str:
        """Say it in one line."""
        checked = f"{self.num_checked:,} of {self.num_documents:,} documents decoded"
        if not self.num_changed and not self.num_unknown:
            return f"{checked}, all unchanged"
        parts = [f"{self.num_changed:,} come back changed, {_percent(self.lost_share)} of the bytes are lost"]
        if self.lost:
            parts.append(", ".join(f"{_name(c)} {count:,}" for c, count in self.lost.most_common(_MOST_NAMED)))
        if self.num_unknown:
            parts.append(f"{_percent(self.num_unknown / self.num_tokens)} of all tokens are unknown")
        return f"{checked}: {'; '.join(parts)}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _name(character: str) -> str:
    """Write a character so that it is seen: itself, or its name."""
    if character.isprintable() and not character.isspace():
        return character
    return {"\n": "line end", "\t": "tab", " ": "space"}.get(character) or unicodedata.name(
        character, f"U+{ord(character):04X}"
    ).lower()
