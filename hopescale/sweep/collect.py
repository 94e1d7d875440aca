"""Results of a sweep as a table: one row a trial, in `points.csv` of the sweep's folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from hopescale.checkpoint.manifest import read_manifest, read_pointer
from hopescale.common.disk import replace_text
from hopescale.common.errors import CheckpointError, LaunchError
from hopescale.observe.run_status import DONE
from hopescale.sweep.grid import columns
from hopescale.sweep.progress import as_trained, is_chosen, status_in_sweep, trial_folder
from hopescale.sweep.score import score
from hopescale.sweep.trial import Trial

POINTS = "points.csv"
CHOSEN, NOT_CHOSEN = "yes", "no"
"""Values of the column `chosen`."""

_YES_NO = {True: CHOSEN, False: NOT_CHOSEN, None: ""}


def collect(trials: Sequence[Trial], folder: Path) -> Path:
    """Write `points.csv`: name, series, labels, N, D, FLOP, loss, state, batch and learning rate of every trial.

    N counts all parameters, D the tokens trained on, FLOP the training's FLOPs, by the config in the run folder. The
    loss is the held-out one of the last step; of runs without held-out text the mean of the last ten recorded training
    losses. `loss_from` says which. A trial that is not done has no loss. In a sweep with branches two more columns name
    the trunk of a branch and the last step that it shares; D and FLOP are those of a run of its own. In a sweep with
    a choice a column `chosen` says whether a trial has the chosen value, and is empty as long as that is open. Once
    trials have been asked a suite after their last step, a column `score` has their mean accuracy, and `score_from`
    says what they were asked. Once a run has gone back to a lower rate, `rate_factor` has the factor it ended with.

    Raises:
        LaunchError: If it cannot be written.
    """
    labels, text, path = columns(trials), io.StringIO(), folder / POINTS
    writer = csv.writer(text, lineterminator="\n")
    places = ["trunk", "branch_step"] if any(trial.branch for trial in trials) else []
    trials = as_trained(trials, folder)
    scores = {trial.name: score(trial_folder(folder, trial), trial.steps) for trial in trials}
    places += ["chosen"] * any(trial.choice for trial in trials)
    places += ["score", "score_from"] if any(scores.values()) else []
    factors = {trial.name: _rate_factor(trial_folder(folder, trial)) for trial in trials}
    places += ["rate_factor"] * any(factor != 1 for factor in factors.values())
    columns_of_runs = ["N", "D", "FLOP", "loss", "loss_from", "state", "batch", "lr"]
    writer.writerow(["trial", "series", *labels, *columns_of_runs, *places])
    for trial in trials:
        status = status_in_sweep(trial, folder)
        done = status.state == DONE and status.loss is not None
        head = (trial.name, trial.series, *(trial.labels.get(label, "") for label in labels))
        loss = (f"{status.loss:.6f}", status.source) if done else ("", "")
        rates = trial.config.train.global_batch_tokens, f"{trial.config.optim.lr:g}"
        further = {"chosen": _YES_NO[is_chosen(trial, folder)], "rate_factor": f"{factors[trial.name]:g}"}
        if trial.branch:
            further |= {"trunk": trial.branch.trunk, "branch_step": trial.branch.step}
        if (scored := scores[trial.name]) is not None:
            further |= {"score": f"{scored.value:.4f}", "score_from": scored.source}
        own = (further.get(place, "") for place in places)
        writer.writerow([*head, trial.params, trial.tokens, trial.flops, *loss, status.state, *rates, *own])
    try:
        replace_text(path, text.getvalue())
    except OSError as error:
        raise LaunchError(f"cannot write {path}: {error.strerror}") from error
    return path


def _rate_factor(run_dir: Path) -> float:
    """Return the factor on the learning rates that a run has come to, by its latest checkpoint (`train.recovery`)."""
    checkpoint = read_pointer(run_dir / "checkpoints")
    try:
        return 1.0 if checkpoint is None else read_manifest(checkpoint).progress.get("recovery", {})["rate_factor"]
    except (CheckpointError, KeyError):
        return 1.0
