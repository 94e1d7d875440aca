"""`hopescale sweep`: many trials planned, run and collected as one, and the law fitted to them. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from time import sleep
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from hopescale.cli import law_checks, laws
from hopescale.common.disk import replace_text
from hopescale.common.errors import ConfigError, LaunchError
from hopescale.common.paths import display_path
from hopescale.common.units import format_count, plural
from hopescale.config.check import check_layout
from hopescale.config.layout import make_layout
from hopescale.config.notes import notes
from hopescale.config.record import CONFIG
from hopescale.launch.array import Element, Stage, require_no_jobs, submit_array, submit_stages
from hopescale.launch.ledger import JOBS
from hopescale.launch.profile import load_profile
from hopescale.observe.run_folder import SWEEP_MARKS, require_own
from hopescale.observe.run_status import DIVERGED, DONE, FAILED, RUNNING
from hopescale.sweep.begun import folders_of_others, left_over, under_old_names
from hopescale.sweep.branches import saving
from hopescale.sweep.choice import LEFT_OUT, spent_on
from hopescale.sweep.collect import collect as write_points
from hopescale.sweep.grid import Sweep, columns, load_sweep, make_trials
from hopescale.sweep.pool import locked, run_trials, train_words
from hopescale.sweep.progress import (
    TrialStatus,
    as_trained,
    is_chosen,
    require_same,
    status_in_sweep,
    trial_folder,
    trial_status,
)
from hopescale.sweep.score import score
from hopescale.sweep.stages import make_stages
from hopescale.sweep.trial import Trial

app = typer.Typer(help="Plan and run many trials, fit laws to their losses, draw them.", no_args_is_help=True)

SweepFile = Annotated[Path, typer.Argument(metavar="SWEEP.yaml", help="A sweep's file, or the name of a shipped one.")]
SweepDir = Annotated[Path | None, typer.Option(help="Sweep folder.", show_default="sweeps/<name>")]

_NAMED = 4
"""Most trials that a note names."""

_STYLES = {DONE: "green", RUNNING: "bold", FAILED: "red", DIVERGED: "magenta"}


@app.command()
def plan(sweep: SweepFile) -> None:
    """Check every trial and show them all: parameters, tokens, steps, FLOPs. Trains nothing, writes nothing."""
    loaded, trials, _ = _read(sweep)
    labels = columns(trials)
    branches = ["from step"] if any(trial.branch for trial in trials) else []
    table = _table("trial", *labels, right=("parameters", "tokens", "steps", *branches, "batch", "lr", "FLOPs"))
    for trial in trials:
        train = trial.config.train
        counts = (format_count(trial.params), format_count(trial.tokens), f"{trial.steps:,}")
        batch, lr = f"{train.global_batch_tokens:,}", f"{trial.config.optim.lr:.3g}"
        of_trial = (escape(trial.labels.get(label, "")) for label in labels)
        begins = [str(trial.branch.step) if trial.branch else ""] if branches else []
        table.add_row(trial.name, *of_trial, *counts, *begins, batch, lr, f"{trial.flops:.3g}")
    _print(table)
    by_series = dict.fromkeys(trial.series for trial in trials)
    for series in by_series:
        own = [trial for trial in trials if trial.series == series]
        flops, tokens = sum(trial.flops for trial in own), sum(trial.tokens for trial in own)
        typer.echo(f"{series}: {plural(len(own), 'trial')}, {format_count(tokens)} tokens, {flops:.3g} FLOPs")
        if lacking := _too_few(own):
            typer.echo(f"  note: no law can be fitted to them, `sweep plot` shows them all the same: {lacking}")
    told: dict[str, list[str]] = {}
    for trial in trials:
        for note in notes(trial.config):
            told.setdefault(note, []).append(trial.name)
    for note, names in told.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        typer.echo(f"note: {names[0]}{others}: {note}")
    paths = {source.path: None for trial in trials for source in trial.config.data.sources.values() if source.path}
    for path in paths:
        if "://" not in path and not Path(path).expanduser().exists():
            typer.echo(f"note: data {path} does not exist here; `sweep run` needs it")
    if branches:
        spent, apart = saving(trials)
        share = f"{spent / apart:.3f} of the {apart:.3g} of separate runs"
        typer.echo(f"horizons of a size share one run: {spent:.3g} FLOPs are spent, {share}")
    if trials[0].choice is not None:
        choosing, following, number = spent_on(trials)
        candidates = sum(trial.is_candidate for trial in trials)
        text = f"{candidates} trials choose {loaded.config.choose}, in {choosing:.3g} FLOPs"
        left = f"{len(trials) - candidates - number} are left out"
        typer.echo(f"{text}; {number} follow with the best value, in {following:.3g}; {left}")
    elif len(by_series) > 1:
        typer.echo(f"in all: {len(trials)} trials, {sum(trial.flops for trial in trials):.3g} FLOPs")


def _too_few(trials: Sequence[Trial]) -> str | None:
    """Say that the trials of a series are too few for a law, where sizes or tokens differ and a law may be meant."""
    import numpy as np

    from hopescale.scaling.fit import ENOUGH, too_few

    params, tokens = (np.array(values, float) for values in zip(*((t.params, t.tokens) for t in trials), strict=True))
    lacking = too_few(params, tokens)
    differ = len(set(params)) > 1 or len(set(tokens)) > 1
    return f"{lacking}; {ENOUGH}" if lacking and differ else None


@app.command()
def run(
    sweep: SweepFile,
    jobs: Annotated[int, typer.Option(min=1, help="Trials at a time.")] = 1,
    retries: Annotated[int, typer.Option(min=0, help="Starts after the first that failed, for each trial.")] = 1,
    sweep_dir: SweepDir = None,
) -> None:
    """Train the trials that are not done on this machine, then collect. The same command continues after a stop.

    Exit codes: 0 all trials are done or diverged, 2 config, 3 data, 5 trials failed, 75 stopped early and resumable.
    """
    loaded, trials, folder = _read(sweep, sweep_dir)
    with locked(folder):
        require_same(loaded, trials, folder)
        _keep_file(loaded, folder)
        live = Live(_states(trials, folder), auto_refresh=False) if sys.stdout.isatty() else None
        try:
            with live or nullcontext():
                run_trials(
                    trials,
                    folder,
                    jobs=jobs,
                    retries=retries,
                    environ=os.environ,
                    report=partial(live.console.print, markup=False, highlight=False) if live else typer.echo,
                    show=(lambda: live.update(_states(trials, folder), refresh=True)) if live else lambda: None,
                )
        finally:
            write_points(trials, folder)
    _summary(trials, folder)


@app.command()
def submit(
    sweep: SweepFile,
    *,
    cluster: Annotated[str, typer.Option(help="A profile of a cluster: a file, or the name of a shipped one.")],
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of each trial.")] = 1,
    time: Annotated[str | None, typer.Option(help="Time limit of each, as of sbatch.")] = None,
    max_at_once: Annotated[int | None, typer.Option(min=1, metavar="M", help="Trials at a time.")] = None,
    first: Annotated[int | None, typer.Option(min=1, metavar="K", help="Only the first K trials.")] = None,
    only: Annotated[str | None, typer.Option(metavar="failed", help="`failed`: those alone that have failed.")] = None,
    sweep_dir: SweepDir = None,
) -> None:
    """Submit the trials that are not done as an array of Slurm jobs; return as soon as it is in the queue."""
    if only not in (None, "failed"):
        raise ConfigError(f"--only is {only}, but must be failed")
    loaded, trials, folder = _read(sweep, sweep_dir)
    if loaded.config.branch and (first or only):
        idle = "--first" if first else "--only"
        raise ConfigError(f"{idle} does not go with branches, which wait for their trunks", "submit all that is left")
    profile, folder = load_profile(cluster), folder.absolute()
    for trial in trials:
        check_layout(trial.config, make_layout(trial.config, nodes * profile.ranks))
    with locked(folder):
        require_same(loaded, trials, folder)
        require_no_jobs(_not_begun(trials, folder), f"{display_path(loaded.path)} makes no trial of this name any more")
        _keep_file(loaded, folder)
        how = {"nodes": nodes, "max_at_once": max_at_once, "time": time}
        if loaded.config.branch:
            ids = submit_stages(_stages(trials, folder), profile, folder, **how)
        else:
            ids = submit_array(_elements(trials[:first], folder), profile, folder, only=only, **how)
    undecided = [trial for trial in trials if not trial.is_candidate and is_chosen(trial, folder) is None]
    if undecided:
        typer.echo(
            f"{len(undecided)} trials wait for the choice of {loaded.config.choose}: submit again when it is made"
        )
    for id in ids:
        typer.echo(f"job {id}, trials in {display_path(folder / 'trials')}")
    if not ids:
        typer.echo("nothing to submit: no trial is left" if only is None else "nothing to submit: no trial has failed")


def _not_begun(trials: Sequence[Trial], folder: Path) -> list[Path]:
    """Return the folders of none of these trials that had a job and have no config yet, so that nobody knows theirs."""
    return [path for path in folders_of_others(trials, folder, JOBS) if not (path / CONFIG).exists()]


def _elements(trials: Sequence[Trial], folder: Path) -> list[Element]:
    chosen = [(trial, trial_folder(folder, trial)) for trial in trials]
    return [
        Element(trial.name, run_dir, tuple(train_words(trial, run_dir)))
        for trial, run_dir in chosen
        if trial_status(run_dir).state not in (DONE, DIVERGED) and (trial.is_candidate or is_chosen(trial, folder))
    ]


def _stages(trials: Sequence[Trial], folder: Path) -> list[Stage]:
    return [
        Stage({n: Element(start.trial.name, start.run_dir, start.words) for n, start in starts.items()}, after)
        for starts, after in make_stages(trials, folder)
    ]


@app.command()
def status(
    context: typer.Context,
    sweep: SweepFile,
    sweep_dir: SweepDir = None,
    watch: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0.1, help="Show again, until all ended.")
    ] = None,
) -> None:
    """Show how far every trial is, wherever it runs: read from the run folders."""
    _, trials, folder = _read(sweep, sweep_dir)
    trials = as_trained(trials, folder)
    if watch is None:
        _print(_states(trials, folder))
        _summary(trials, folder)
        return
    with Live(_states(trials, folder), auto_refresh=False) as live:
        while any(current.state not in (DONE, DIVERGED, FAILED, LEFT_OUT) for current in _statuses(trials, folder)):
            if context.obj["console"].is_unread:
                return
            sleep(watch)
            live.update(_states(trials, folder), refresh=True)


@app.command()
def collect(sweep: SweepFile, sweep_dir: SweepDir = None) -> None:
    """Write points.csv: series, labels, N, D, FLOP, loss and state of every trial, as `sweep fit` reads it."""
    _, trials, folder = _read(sweep, sweep_dir)
    if not folder.is_dir():
        raise LaunchError(f"no sweep folder {folder}", f"start it with: hopescale sweep run {sweep}")
    typer.echo(write_points(trials, folder))
    _summary(trials, folder)


app.command()(laws.fit)
app.command()(laws.plot)
app.command()(law_checks.rollout)
app.command()(law_checks.rates)
app.command("next")(law_checks.propose_next)


def _read(path: Path, sweep_dir: Path | None = None) -> tuple[Sweep, list[Trial], Path]:
    """Return a sweep, its trials under the names that they began with, and its folder."""
    sweep = load_sweep(path)
    folder = sweep_dir or sweep.folder
    trials, renamed = under_old_names(make_trials(sweep), folder)
    file = display_path(sweep.path)
    if renamed:
        pairs = _some([f"{new} is {old}" for new, old in renamed.items()])
        typer.echo(f"note: {file} names these trials anew, and they keep their old names: {pairs}", err=True)
    if left := left_over(trials, folder):
        where = f"these trials in {folder / 'trials'}, which are left out"
        typer.echo(f"note: {file} no longer makes {where}: {_some(left)}", err=True)
    return sweep, trials, folder


def _some(names: Sequence[str]) -> str:
    """Name the first ones, and count the others."""
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _keep_file(sweep: Sweep, folder: Path) -> None:
    """Keep the sweep's file beside its trials, in a new folder or in that of a sweep."""
    kept = folder / "sweep.yaml"
    require_own(folder, "--sweep-dir", SWEEP_MARKS, also=(sweep.path,))
    try:
        (folder / "trials").mkdir(exist_ok=True)
        if not (kept.exists() and kept.samefile(sweep.path)):
            replace_text(kept, sweep.path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchError(f"cannot write the sweep folder {folder}: {error.strerror}") from error


def _statuses(trials: Sequence[Trial], folder: Path) -> list[TrialStatus]:
    return [status_in_sweep(trial, folder) for trial in trials]


def _states(trials: Sequence[Trial], folder: Path) -> Table:
    scores = [score(trial_folder(folder, trial), trial.steps) for trial in trials]
    has_scores = any(scores)
    table = _table("trial", "state", right=("step", "of", "loss", *["score"] * has_scores, "tokens/s", "starts"))
    for trial, current, scored in zip(trials, _statuses(trials, folder), scores, strict=True):
        style = _STYLES.get(current.state, "")
        state = f"[{style}]{current.state}[/]" if style else current.state
        loss = "" if current.loss is None else f"{current.loss:.4f}"
        tps = "" if current.tps is None else f"{current.tps:,.0f}"
        starts = str(current.starts or "")
        answers = ["" if scored is None else f"{scored.value:.3f}"] * has_scores
        table.add_row(trial.name, state, f"{current.step or 0:,}", f"{trial.steps:,}", loss, *answers, tps, starts)
    return table


def _table(*left: str, right: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _print(table: Table) -> None:
    """Print a table, on as many columns as it needs where nobody looks."""
    console = Console()
    (console if console.is_terminal else Console(width=10_000)).print(table)


def _summary(trials: Sequence[Trial], folder: Path) -> None:
    states = [current.state for current in _statuses(trials, folder)]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    if not folder.is_dir():
        hint = "begun elsewhere, it is found from there, or by --sweep-dir"
        typer.echo(f"note: there is no sweep folder {folder.absolute()}; {hint}", err=True)
    typer.echo(f"{folder}: {plural(len(trials), 'trial')}, {counts}")
