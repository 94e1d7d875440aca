"""The report of an analysis: one HTML file that needs no other, and its figures as PNG beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from hopescale.common.errors import DataError
from hopescale.common.units import format_count
from hopescale.scaling.analysis import Analysis, SeriesAnalysis
from hopescale.scaling.bootstrap import Interval
from hopescale.scaling.curves import Curve
from hopescale.scaling.plot import draw
from hopescale.scaling.points import Table
from hopescale.scaling.summary import (
    between,
    budgets_ahead,
    describe_doubts,
    describe_forecast,
    describe_growth,
    describe_scores,
    law_text,
    other_losses,
    times,
    times_of_runs,
)

_SWEEP_TABLE = "points.csv"

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: .6em 0 1em; }
caption { text-align: left; color: #555; padding-bottom: .3em; }
th, td { padding: .2em .9em .2em 0; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 1px solid #999; font-weight: 600; }
small { color: #666; } figure { margin: 1.2em 0 2em; } img { max-width: 100%; } figcaption, li { color: #444; }
code { background: #f3f3f3; padding: .1em .3em; }
"""


def write_report(analysis: Analysis, curves: Sequence[Curve], folder: Path) -> Path:
    """Write `report.html` and a PNG of every figure into a folder, which is made if missing; return the HTML file.

    Files of the same names are replaced.

    Raises:
        DataError: If a file cannot be written.
    """
    parts = [*_tables(analysis), "<h2>Figures</h2>"]
    path = folder / "report.html"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, (caption, figure) in draw(analysis, curves).items():
            image = _png(figure)
            (folder / f"{name}.png").write_bytes(image)
            data = base64.b64encode(image).decode()
            source = f'<img alt="{escape(name)}" src="data:image/png;base64,{data}">'
            parts.append(f"<figure>{source}<figcaption>{escape(caption)}</figcaption></figure>")
        source = analysis.table.source
        name = source.absolute().parent.name if source.name == _SWEEP_TABLE else source.name
        title = f"Runs and laws of {escape(name)}"
        head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        path.write_text("\n".join([head, f"<h1>{title}</h1>", *parts, "</html>"]) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror}", "choose another folder with --out") from error
    return path


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _tables(analysis: Analysis) -> Iterator[str]:
    """Yield the numbers as HTML."""
    table = analysis.table
    num_runs = sum(len(series.points) for series in analysis.series.values())
    yield (
        f"<p>{num_runs} runs of <code>{escape(table.source.name)}</code>. Intervals are 95 % intervals: how far the "
        "noise of these runs can have moved a value, if the form of the law is right.</p>"
    )
    if analysis.reference:
        yield f"<h2>Against {escape(analysis.reference)}</h2>"
        if note := other_losses(analysis):
            yield f"<p>{escape(note)}</p>"
        yield from _multipliers(analysis)
    yield "<h2>The law of each series</h2>"
    numbers, rows = ("E", "A", "alpha", "B", "beta"), []
    for name, series in analysis.series.items():
        if series.fit is None:
            continue
        law, intervals = series.fit.law.to_dict(), series.intervals()
        values = (_value(f"{law[number]:.4g}", intervals.get(number)) for number in numbers)
        rows.append([name, str(len(series.points)), *values])
    if rows:
        yield _rows("L = E + A / N^alpha + B / D^beta, in nats per token", ["", "runs", *numbers], rows)
    for name, series in analysis.series.items():
        yield from _series(name, series)
    if analysis.scores is not None:
        lines = (f"<li>{escape(line.strip())}</li>" for line in describe_scores(analysis, analysis.scores))
        yield f"<h2>Scores</h2><ul>{''.join(lines)}</ul>"
    if table.left_out:
        yield f"<h2>Left out</h2><ul>{''.join(f'<li>{escape(line)}</li>' for line in table.left_out)}</ul>"
    if table.rows:
        yield f"<h2>Runs</h2>{_runs(table)}"


def _multipliers(analysis: Analysis) -> Iterator[str]:
    for name, values in analysis.multipliers.items():
        yield _rows(
            f"{name}: the compute that {analysis.reference} needs for the same loss, by the laws",
            ["FLOPs", "loss", "times"],
            [[f"{one.flops:.2e}", f"{one.loss:.4f}", _value(times(one), one.interval)] for one in values],
        )
    for name, values in analysis.of_runs.items():
        yield _rows(
            f"{name}: the compute that {analysis.reference} needs for the same loss, by the best runs alone",
            ["FLOPs", "loss", "times"],
            [[f"{one.flops:.2e}", f"{one.loss:.4f}", escape(times_of_runs(one))] for one in values],
        )


def _runs(table: Table) -> str:
    """Return the file's own table: every run, with all that its columns say."""
    return _rows("all runs", table.header, [[row[0], *map(escape, row[1:])] for _, row in table.rows])


def _series(name: str, series: SeriesAnalysis) -> Iterator[str]:
    lines = [*describe_doubts(series), *describe_growth(series), *describe_forecast(series)]
    if series.doubt is not None:
        yield f"<h3>{escape(name)}</h3><ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"
        return
    yield _rows(
        f"{name}: {law_text(series)}: the best size for a budget",
        ["FLOPs", "parameters", "tokens", "loss"],
        [
            [
                f"{best.flops:.2e}",
                _value(format_count(best.params), best.params_interval, count=True),
                _value(format_count(best.tokens), best.tokens_interval, count=True),
                _value(f"{best.loss:.4f}", best.loss_interval),
            ]
            for best in map(series.optimum, budgets_ahead(series))
        ],
    )
    yield f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def _rows(caption: str, head: list[str], rows: list[list[str]]) -> str:
    """Return a table; cells of `rows` are HTML already where `_value` made them."""
    heads = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell}</td>" for cell in [escape(row[0]), *row[1:]]) + "</tr>" for row in rows
    )
    return f"<table><caption>{escape(caption)}</caption><tr>{heads}</tr>{body}</table>"


def _value(text: str, interval: Interval | None, count: bool = False) -> str:
    return escape(text) + (f"<br><small>{escape(between(interval, count).strip(' ()'))}</small>" if interval else "")
