"""A bar on standard error for commands that take long: what is done, at which rate, and the time left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


class Bar:
    """A task of a progress display.

    Args:
        progress: Display.
        task: Task of it.
        verb: Word for what is done.
    """

    def __init__(self, progress: Progress, task: TaskID, verb: str):
        self._progress, self._task, self._verb = progress, task, verb

    def advance(self, num_bytes: int) -> None:
        """Add to what is done."""
        self._progress.advance(self._task, num_bytes)

    def advance_of(self, num_bytes: int, total: int) -> None:
        """Add to what is done of a total that was not known before."""
        self._progress.update(self._task, total=total, advance=num_bytes)

    def note(self, text: str) -> None:
        """Write a text behind the verb."""
        self._progress.update(self._task, description=f"{self._verb} {text}")

    def begin(self, verb: str, total: int | None) -> None:
        """Go on to something else, of so many bytes; null is unknown."""
        self._verb = verb
        self._progress.reset(self._task, description=verb, total=total)


@contextmanager
def progress_bar(verb: str, total: int | None = None) -> Iterator[Bar]:
    """Show a bar on standard error, if that is a terminal, until the block ends.

    Args:
        verb: Word for what is done.
        total: Bytes that there are to do; null shows the time alone.
    """
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Bar(progress, progress.add_task(verb, total=total), verb)
