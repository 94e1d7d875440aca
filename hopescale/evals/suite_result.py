"""Results of a suite. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PLACES = 8
"""Parts of a row for which accuracy is told apart."""


@dataclass(frozen=True)
class SuiteResult:
    """The answers of a model to one task with one group of settings."""

    task: str
    settings: Mapping[str, Any]
    """All settings of the task, `length` among them."""
    examples: int
    questions: int
    """Answers that were asked, in all examples."""
    accuracy: float
    """Share of the answers that are right."""
    stderr: float
    """Standard error of the accuracy over examples."""
    exact: float
    """Share of the examples of which all answers are right."""
    last: float
    """Share of the examples of which the last answer is right."""
    loss: float
    """Nats of an answer."""
    chance: float
    """Accuracy of a guess."""
    best: float
    """Greatest accuracy that can be expected."""
    places: Sequence[tuple[int, int, float]]
    """First and last place of a part of the row, and the accuracy there; only parts in which something is asked."""


@dataclass(frozen=True)
class PositionResult:
    """The loss of a model on held-out text, by the place in the context."""

    name: str
    """Name of the source."""
    length: int
    """Tokens of a row."""
    rows: int
    places: Sequence[tuple[int, int, float]]
    """First and last place, and the mean loss in nats per token there."""


_TITLES = ("suite", "settings", "answers", "accuracy", "stderr", "exact", "last", "loss", "chance", "best")


def suite_table(results: Sequence[SuiteResult]) -> Iterator[str]:
    """Write results in columns, one a line, with the score of chance and the best one beside each."""
    rows = [_TITLES]
    for one in results:
        numbers = (one.accuracy, one.stderr, one.exact, one.last, one.loss, one.chance, one.best)
        rows.append((one.task, described(one.settings), f"{one.questions:,}", *(f"{number:.4f}" for number in numbers)))
    yield from columns(rows)


def position_table(results: Sequence[PositionResult]) -> Iterator[str]:
    """Write the loss by place, a part of the row a line."""
    rows = [("text", "tokens", "loss")]
    rows += [(one.name, f"{low}-{high}", f"{loss:.4f}") for one in results for low, high, loss in one.places]
    yield from columns(rows)


def described(settings: Mapping[str, Any]) -> str:
    """Write settings as on the command line; those that are null are left out."""
    return " ".join(f"{name}={value}" for name, value in settings.items() if value is not None)


def columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Align the cells of rows."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
