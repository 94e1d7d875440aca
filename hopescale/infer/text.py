"""Prompts and answers as text: the only file of inference that knows a tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hopescale.common.errors import ConfigError
from hopescale.data.tokenizer import Tokenizer


def encode_prompt(
    prompt: str, tokenizer: Tokenizer | None, vocab_size: int, *, goes_on: bool = False, key: str = "--prompt"
) -> list[int]:
    """Turn a prompt into token ids.

    With a tokenizer the ids begin with its end-of-text token, as every document does in training. A model of synthetic
    data has no tokenizer: its prompt is ids in decimal, parted by spaces.

    Args:
        prompt: Text.
        tokenizer: Tokenizer of the model, if it has one.
        vocab_size: Vocabulary size of the model.
        goes_on: Whether a text has been read already, which the prompt goes on: it has no end-of-text token in front,
            and may be empty.
        key: Option or key of the config that gave it, for messages.

    Raises:
        ConfigError: If ids are expected and something else is given, or an id is not in the vocabulary.
    """
    if tokenizer is not None:
        return [tokenizer.eos_id] * (not goes_on) + tokenizer.encode(prompt)
    if goes_on and not prompt.strip():
        return []
    try:
        ids = [int(word) for word in prompt.split()]
    except ValueError:
        ids = []
    if not ids or not all(0 <= i < vocab_size for i in ids):
        raise ConfigError(
            f"{key} is {prompt!r}, but this model was trained on synthetic symbols and has no tokenizer",
            f"give symbols as numbers from 0 to {vocab_size - 1}, parted by spaces",
        )
    return ids


def decode_stream(ids: Iterable[int], tokenizer: Tokenizer | None) -> Iterator[str]:
    """Yield the text of ids as they come; text that later ids may change is held back."""
    if tokenizer is None:
        yield from (f"{token} " for token in ids)
        return
    shown: list[int] = []  # the last ids whose text is out: a tokenizer may decode the first id of a list differently
    held: list[int] = []
    for token in ids:
        held.append(token)
        text = tokenizer.decode([*shown, *held])
        if not text.endswith("\N{REPLACEMENT CHARACTER}") and not tokenizer.is_open(token):
            piece = text[len(tokenizer.decode(shown)) :]
            yield piece
            shown, held = held if piece else [*shown, *held], []
    if held:
        yield tokenizer.decode([*shown, *held])[len(tokenizer.decode(shown)) :]
