"""A comparison as one JSON and one page of Markdown, and its figures where matplotlib is there. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from hopescale.common.errors import DataError
from hopescale.evals.comparison import Comparison, MeasuredPoint, Spread

JSON, MARKDOWN = "report.json", "report.md"
MOST_COLUMNS = 6
"""Systems that stand side by side; more of them stand below one another."""


def write_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Write all files into a folder, which is made if missing; files of the same names are replaced.

    Raises:
        DataError: If a file cannot be written.
    """
    figures = {}
    if find_spec("matplotlib") is not None:
        from hopescale.evals.comparison_plot import draw

        figures = draw(comparison)
    body = {name: [asdict(one) for one in getattr(comparison, name)] for name in comparison.__dataclass_fields__}
    files = [folder / JSON, folder / MARKDOWN]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files[0].write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
        files[1].write_text("\n".join(page(comparison, list(figures))) + "\n", encoding="utf-8")
        for name, figure in figures.items():
            files.append(folder / f"{name}.png")
            figure.savefig(files[-1], format="png", metadata={"Software": None})
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror}", "choose another folder") from error
    return files


def page(comparison: Comparison, figures: Sequence[str]) -> Iterator[str]:
    """Yield the lines of the page."""
    yield from ("# Evaluations side by side", "")
    yield "A value is the mean over the seeds of a system, with the 95 % interval of that mean (Student's t) and the"
    yield "number of seeds. One seed has no interval; its value stands with the standard error over examples."
    yield from ("", *_rows(("system", "checkpoints"), _checkpoints(comparison)))
    titles = [system.title for system in comparison.systems]
    if comparison.suites:
        yield from ("", "## Suites: accuracy", "")
        yield "Chance guesses among the answers that a row allows; no model can expect more than the best."
        head = ("suite", "settings", "chance", "best", *titles)
        yield from ("", *_table(head, [_suite_row(one, comparison.suites, titles) for one in comparison.suites], 4))
    for name, measured, measure in (
        ("Loss by place in the context, nats per token", comparison.positions, "loss"),
        ("Other measures", comparison.others, "value"),
    ):
        if measured:
            rows = [[one.suite, _text(one.settings), *_cells(one, titles, measure)] for one in measured]
            yield from ("", f"## {name}", "", *_table(("of", "", *titles), rows, 2))
    for name in figures:
        yield from ("", f"![{name.replace('_', ' ')}]({name}.png)")


def _checkpoints(comparison: Comparison) -> Iterator[list[str]]:
    for system in comparison.systems:
        yield [system.title, "<br>".join(f"`{model}`" for model in system.models)]


def _suite_row(one: MeasuredPoint, all_points: Sequence[MeasuredPoint], titles: Sequence[str]) -> list[str]:
    """Write a point with its length and those settings that differ between points of its suite."""
    points = [dict(other.settings) for other in all_points if other.suite == one.suite]
    varied = [
        (name, value)
        for name, value in one.settings
        if name == "length" or any(point.get(name) != value for point in points)
    ]
    return [one.suite, _text(varied), f"{one.chance:.3f}", f"{one.best:.3f}", *_cells(one, titles, "accuracy")]


def _cells(one: MeasuredPoint, titles: Sequence[str], measure: str) -> list[str]:
    return [_cell(one.values[title][measure]) if title in one.values else "" for title in titles]


def _cell(value: Spread) -> str:
    if value.low is not None:
        return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}] ({value.seeds})"
    return f"{value.mean:.3f}" + ("" if value.stderr is None else f" ± {value.stderr:.3f}")


def _text(settings: Sequence[tuple[str, object]]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings if value is not None)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], asked: int) -> Iterator[str]:
    """Write a table of systems; of many systems, one with a row for each.

    Args:
        head: Names of the columns.
        rows: Cells of each row.
        asked: Number of the first columns, which say what was asked; the others are systems.
    """
    if len(head) - asked <= MOST_COLUMNS:
        return _rows(head, rows)
    names = (", ".join(filter(None, row[:2])) for row in rows)
    turned = zip(head[2:], *(row[2:] for row in rows), strict=True)
    return _rows(("system", *names), turned)


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(cell.replace('|', '/') for cell in head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"
