"""An evaluation: all that it reads is opened before anything is computed, then the model is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hopescale.common.errors import ConfigError, HopescaleError
from hopescale.data.loader import Data
from hopescale.evals.perplexity import held_out_loss, open_held_out
from hopescale.evals.report import TaskResult
from hopescale.evals.request import PERPLEXITY, EvalRequest
from hopescale.infer.load import LoadedModel
from hopescale.parallel.control import Control


def evaluate(
    loaded: LoadedModel, request: EvalRequest, control: Control, report: Callable[[str], None]
) -> list[TaskResult]:
    """Measure a model. Called by all ranks, with results that do not depend on their number.

    Args:
        loaded: The whole model, on every rank.
        request: Tasks and data to measure.
        control: Control by which ranks meet.
        report: Takes lines about what is done; those of the first rank stand for all.

    Raises:
        ConfigError: If a task is unknown or asks for what there is not, or the model has no tokenizer for text.
        DataError: If data is missing or damaged.
    """
    data, tasks = control.all_ranks_or_raise(lambda: _prepared(loaded, request))
    results: list[TaskResult] = []
    try:
        if request.tasks:
            from hopescale.evals.language_model import EvaluatedModel
            from hopescale.evals.tasks import run_tasks

            model = EvaluatedModel(loaded, control, context_of(loaded, request), report)
            results += run_tasks(model, tasks, request.limit)
        if data is not None:
            results += held_out_loss(loaded, data, control)
    except HopescaleError as error:  # met by all ranks alike
        error.repeated = not control.is_first
        raise
    return results


def _prepared(loaded: LoadedModel, request: EvalRequest) -> tuple[Data | None, dict[str, Any]]:
    """Open all that will be read, before anything is computed."""
    if request.tasks and loaded.tokenizer is None:
        message = f"{loaded.folder} has no tokenizer, so it cannot be asked {', '.join(request.tasks)}, which are text"
        raise ConfigError(message, f"--tasks {PERPLEXITY} needs none")
    data, tasks = open_held_out(loaded, request.data) if request.perplexity else None, {}
    if request.tasks:
        from hopescale.evals.tasks import load_tasks

        tasks = load_tasks(request.tasks, request.task_path)
    return data, tasks


def context_of(loaded: LoadedModel, request: EvalRequest) -> int | None:
    """Return how many tokens are read at most before one that is predicted; None is all there are."""
    if request.context is None and loaded.config.model.mixer == "attention":
        return loaded.config.train.seq_len
    return request.context
