"""Tasks of lm-eval: found, loaded and run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from lm_eval import evaluate
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from hopescale.checkpoint.load import first_line
from hopescale.common.errors import ConfigError, DataError
from hopescale.evals.language_model import EvaluatedModel
from hopescale.evals.report import TaskResult

RESAMPLES = 1000
"""Samples drawn for the standard error of a metric that has no formula for it."""
SEED = 1234
"""Seed of the choice of examples that stand before a question."""


def load_tasks(shots: Mapping[str, int | None], folder: Path | None) -> dict[str, Any]:
    """Find tasks and groups of them, lm-eval's or those of a folder in its format, and read or fetch their data.

    A number of solved examples of None is the task's own.

    Raises:
        ConfigError: If a task is not known.
        DataError: If a task cannot be loaded.
    """
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    manager = _manager(shots, folder)
    for name, number in shots.items():
        try:
            loaded = manager.load([name])
        except Exception as error:  # a task may be made by any code, and fetch its data from anywhere
            hint = "its data must be on this machine, or the network within reach"
            raise DataError(f"task {name} cannot be loaded: {first_line(error)}", hint) from error
        for task in loaded["tasks"].values():
            _prepare(task, number)
        for kind, members in loaded.items():
            found[kind] |= members
    return found


def _manager(names: Mapping[str, Any], folder: Path | None) -> TaskManager:
    """Index the tasks of a folder, and lm-eval's own thousands only where they are needed.

    Raises:
        ConfigError: If a name is in neither.
    """
    if folder is not None:
        if not folder.is_dir():
            hint = "give the folder that holds the YAML files"
            raise ConfigError(f"--task-path is {folder}, which is no folder", hint)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if set(names) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=folder and str(folder))
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        where = "lm-eval" if folder is None else f"{folder} or lm-eval"
        message = f"--tasks names {', '.join(unknown)}, which {where} does not have"
        raise ConfigError(message, "lm-eval ls tasks lists them")
    return manager


def _prepare(task: Task, shots: int | None) -> None:
    if shots is not None:
        task.set_config(key="num_fewshot", value=shots)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEED)


def run_tasks(model: EvaluatedModel, tasks: Mapping[str, Any], limit: int | None) -> list[TaskResult]:
    """Run loaded tasks. Called by all ranks, and returns the same on all, but standard errors on the first alone."""
    resamples = RESAMPLES if model.control.is_first else 0
    with _quiet(model.control.is_first), _one_process():
        results = evaluate(model, tasks, limit=limit, bootstrap_iters=resamples, log_samples=False)
    return [_result(name, found, results) for name, found in results["results"].items()]


@contextmanager
def _quiet(is_first: bool) -> Iterator[None]:
    """Keep lm-eval's own output away from the table, and let it print on one rank alone."""
    with ExitStack() as stack:
        stream = sys.stderr if is_first else stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(redirect_stdout(stream))
        stack.enter_context(redirect_stderr(stream))
        yield


@contextmanager
def _one_process() -> Iterator[None]:
    """Keep lm-eval from forking a process that has threads; it can be told in no other way."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        del os.environ["DISABLE_MULTIPROC"]
        if before is not None:
            os.environ["DISABLE_MULTIPROC"] = before


def _result(name: str, found: Mapping[str, Any], results: Mapping[str, Any]) -> TaskResult:
    numbers = {key.removesuffix(",none"): value for key, value in found.items() if isinstance(value, int | float)}
    numbers.pop("sample_len", None)
    stderr = {key.replace("_stderr", "", 1): number for key, number in numbers.items() if "_stderr" in key}
    return TaskResult(
        name=name,
        version=str(results["versions"].get(name, "")),
        shots=results["n-shot"].get(name),
        samples=results["n-samples"].get(name, {}).get("effective"),
        metrics={key: float(number) for key, number in numbers.items() if "_stderr" not in key},
        stderr={key: float(number) for key, number in stderr.items()},
    )
