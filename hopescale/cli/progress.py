"""A bar on standard error for commands that take long: what is done, at which rate, and the time left."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text


class Rate(ProgressColumn):
    """A column for how many are done in a second.

    Args:
        unit: Noun for the items that are counted.
    """

    def __init__(self, unit: str):
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """Return the mean rate of the last ones."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} {self._unit}/s")


class Bar:
    """A task of a progress display.

    Args:
        progress: Display.
        task: Task of it.
        verb: Verb for the work, such as `reading`.
    """

    def __init__(self, progress: Progress, task: TaskID, verb: str):
        self._progress, self._task, self._verb = progress, task, verb

    def advance(self, num_bytes: int) -> None:
        """Add to the amount that is done."""
        self._progress.advance(self._task, num_bytes)

    def advance_of(self, num_bytes: int, total: int) -> None:
        """Add to the amount that is done, and set a total that was not known before."""
        self._progress.update(self._task, total=total, advance=num_bytes)

    def show(self, done: int, total: int) -> None:
        """Show how much of a total is done; less than before is something else that has begun."""
        if done < (task := self._progress.tasks[0]).completed or total != task.total:
            self._progress.reset(self._task, total=total)
        self._progress.update(self._task, completed=done)

    def show_part(self, verb: str, done: int, total: int) -> None:
        """Show how much of a part is done; another verb is the next part."""
        if verb != self._verb:
            self.begin(verb, total)
        self.show(done, total)

    def note(self, text: str) -> None:
        """Write a text behind the verb."""
        self._progress.update(self._task, description=f"{self._verb} {text}")

    def begin(self, verb: str, total: int | None) -> None:
        """Go on to something else, of so many bytes; null is unknown."""
        self._verb = verb
        self._progress.reset(self._task, description=verb, total=total)


@contextmanager
def progress_bar(verb: str, total: int | None = None, *, unit: str | None = None) -> Iterator[Bar]:
    """Show a bar on standard error, if that is a terminal, until the block ends.

    Args:
        verb: Verb for the work, such as `reading`.
        total: Bytes that there are to do; null shows the time alone.
        unit: Noun for the items that are counted, if these are not bytes.
    """
    console = Console(stderr=True)
    rate = (DownloadColumn(binary_units=True), TransferSpeedColumn())
    if unit is not None:
        rate = (MofNCompleteColumn(), Rate(unit))
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        *rate,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # Lines of a standard output that goes elsewhere would be shown above the bar, and be lost there.
    options = {"redirect_stdout": sys.stdout.isatty(), "disable": not console.is_terminal}
    with Progress(*columns, console=console, transient=True, **options) as progress:
        yield Bar(progress, progress.add_task(verb, total=total), verb)
