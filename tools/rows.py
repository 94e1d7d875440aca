"""Rows of figures: shown as a Markdown table, added to a file as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def show(rows: list[Row], formats: dict[str, str]) -> None:
    """Print the columns that have a format and occur in the first row, as a Markdown table."""
    shown = [name for name in formats if name in rows[0]]
    table = Table(*shown, box=box.MARKDOWN)
    for row in rows:
        table.add_row(*(format(row[name], formats[name]) for name in shown))
    Console(width=200).print(table)


def add(row: Row, path: Path | None) -> None:
    """Add a row to a file, if there is one."""
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
