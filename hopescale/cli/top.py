"""`hopescale top`: a run in the terminal, drawn anew as it goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hopescale.common.errors import LaunchError
from hopescale.common.units import format_count, format_duration
from hopescale.launch.scheduler import Slurm
from hopescale.launch.status import JobStatus, elements_of_array, run_status
from hopescale.observe.run_status import RUNNING, WAITING

_BARS = "▁▂▃▄▅▆▇█"
_LEVEL = {"updates": "updates", "grad_norm": "gradient", "update_rms": "change"}
_MEMORY = {"eta_mean": "eta", "alpha_mean": "alpha", "surprise": "surprise", "state_norm": "norm"}


def top(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    every: Annotated[float, typer.Option(min=0.2, metavar="SECONDS", help="Time between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Draw once, and end.")] = False,
) -> None:
    """Watch a run: loss, rates, levels, memories, time left. Ends with the run, or with Ctrl-C."""
    if not run.is_dir():
        raise LaunchError(f"there is no run folder {run}", "`hopescale jobs list` shows what there is")
    if elements_of_array(run):
        raise LaunchError(f"{run} is the folder of an array", "name the run folder of one element")
    slurm, console = Slurm(), Console()
    if once or not console.is_terminal:
        console.print(view(run, run_status(run, slurm)))
        return
    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                status = run_status(run, slurm)
                live.update(view(run, status), refresh=True)
                if status.state not in (RUNNING, WAITING):
                    return
                time.sleep(every)
    except KeyboardInterrupt:
        return


def view(run: Path, status: JobStatus) -> Panel:
    """Draw how a run stands."""
    parts: list[Any] = [_progress(status)]
    if losses := _series(status.records, "loss"):
        parts.append(_losses(status.records, losses))
    tables = [table for table in (_rates(status), _levels(status), _memories(status)) if table.row_count]
    if tables:
        parts.append(Columns(tables, padding=(1, 4)))
    title = f"{run}  {status.state}" + (f"  {status.reason}" if status.reason else "")
    return Panel(Group(*parts), title=Text(title), title_align="left")


def _progress(status: JobStatus) -> Table:
    grid = Table.grid(padding=(0, 2))
    step = "no step yet" if status.step is None else f"step {status.step}/{status.steps or '?'}"
    facts = [
        "" if status.tokens is None else f"{format_count(status.tokens)} tokens",
        "" if status.tps is None else f"{format_count(status.tps)} tokens/s",
        "" if status.eta_s is None else f"{format_duration(status.eta_s)} left",
        "" if status.checkpoint is None else status.checkpoint,
    ]
    bar = ProgressBar(total=status.steps or 1, completed=status.step or 0, width=30)
    grid.add_row(step, bar, "  ".join(filter(None, facts)))
    return grid


def _losses(records: Sequence[dict[str, Any]], losses: Sequence[float]) -> Text:
    lines = [f"loss {losses[-1]:.4f}  {spark(losses)}"]
    names = dict.fromkeys(name for record in records for name in record if name.startswith("val/"))
    for name in (name for name in names if name.endswith("/loss")):
        values = _series(records, name)
        if values:
            lines.append(f"{name.removesuffix('/loss')} {values[-1]:.4f}, best here {min(values):.4f}")
    if skipped := _series(records, "steps_skipped"):
        lines.append(f"{skipped[-1]:.0f} bad steps skipped")
    return Text("\n".join(lines))


def spark(values: Sequence[float], width: int = 60) -> str:
    """Draw values as a row of bars, means of neighbours where there are more than `width`."""
    size = -(-len(values) // width)
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in means)


def _rates(status: JobStatus) -> Table:
    table = Table("group", "rate", box=None)
    names = dict.fromkeys(name for record in status.records for name in record if name.startswith("lr/"))
    for name, value in _last_of(status.records, names):
        table.add_row(name.removeprefix("lr/"), f"{value:.2e}")
    if norms := _series(status.records, "grad_norm"):
        table.add_row("gradient norm", f"{norms[-1]:.3g}")
    return table


def _levels(status: JobStatus) -> Table:
    return _by_part(status.records, "level", _LEVEL)


def _memories(status: JobStatus) -> Table:
    return _by_part(status.records, "memory", _MEMORY)


def _by_part(records: Sequence[dict[str, Any]], kind: str, columns: dict[str, str]) -> Table:
    """Draw the last values of all parts of a kind of metric, `level/<name>/...` or `memory/<layer>/...`."""
    table = Table({"level": "level", "memory": "layer"}[kind], *columns.values(), box=None)
    parts = dict.fromkeys(name.split("/")[1] for record in records for name in record if name.startswith(f"{kind}/"))
    for part in parts:
        values = dict(_last_of(records, [f"{kind}/{part}/{column}" for column in columns]))
        cells = (values.get(f"{kind}/{part}/{column}") for column in columns)
        table.add_row(part, *("" if cell is None else f"{cell:.4g}" for cell in cells))
    return table


def _series(records: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [record[name] for record in records if isinstance(record.get(name), int | float)]


def _last_of(records: Sequence[dict[str, Any]], names: Sequence[str]) -> Iterator[tuple[str, float]]:
    for name in names:
        if values := _series(records, name):
            yield name, values[-1]
