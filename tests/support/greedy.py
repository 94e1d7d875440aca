"""Compares greedy texts of two ways through a model: by logits within rounding, by tokens where these decide."""

from __future__ import annotations

import torch
from torch import Tensor


def margins(logits: Tensor) -> Tensor:
    """Return by how much the likeliest token leads the second, `[...]` from logits `[..., V]`."""
    first, second = logits.double().topk(2).values.unbind(-1)
    return first - second


def assert_same_text(text: Tensor, found: Tensor, expected: Tensor, limit: float, other: Tensor) -> None:
    """Compare a greedy text and its logits with what another way through the model gives.

    Logits that are `limit` apart at most can order two tokens otherwise only where these are less than twice that
    apart. From there on the texts are different ones, so rows are compared up to it.

    Args:
        text: Tokens `[B, T]` of the one way, each the likeliest.
        found: Logits `[B, T, V]` from which that way took them.
        expected: Logits `[B, T, V]` of the other way after the same tokens.
        limit: Largest difference of two logits.
        other: Tokens `[B, T]` that the other way wrote by itself.
    """
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=limit)
    assert (found.gather(-1, text[..., None])[..., 0] == found.amax(-1)).all()
    undecided = margins(expected) <= 2 * limit
    for row in range(len(text)):
        equal = int((text[row] == other[row]).long().cumprod(0).sum())
        assert equal == text.shape[1] or undecided[row, equal], f"row {row}, token {equal + 1}"
