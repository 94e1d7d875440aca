"""An evaluation: what is asked of a model, checked before anything is computed, and then measured."""

from __future__ import annotations

from hopescale.common.errors import ConfigError, HopescaleError
from hopescale.evals.perplexity import held_out_loss, open_held_out
from hopescale.evals.report import Result
from hopescale.evals.wanted import PERPLEXITY, Wanted
from hopescale.infer.load import Loaded
from hopescale.parallel.control import Control


def evaluate(loaded: Loaded, wanted: Wanted, control: Control) -> list[Result]:
    """Measure a model. Called by all ranks, each with the whole model; results are those of one rank.

    Raises:
        ConfigError: If a task is unknown or asks for what there is not, or the model has no tokenizer for text.
        DataError: If data is missing or damaged.
    """
    if wanted.tasks and loaded.tokenizer is None:
        message = f"{loaded.folder} has no tokenizer, so it cannot be asked {', '.join(wanted.tasks)}, which are text"
        raise ConfigError(message, f"--tasks {PERPLEXITY} needs none")
    data = open_held_out(loaded, wanted.data) if wanted.perplexity else None
    results: list[Result] = []
    if wanted.tasks:
        from hopescale.evals.language_model import EvaluatedModel
        from hopescale.evals.tasks import load_tasks, run_tasks

        tasks = control.together(lambda: load_tasks(wanted.tasks, wanted.task_path))
    try:
        if wanted.tasks:
            model = EvaluatedModel(loaded, control, context_of(loaded, wanted))
            results += run_tasks(model, tasks, wanted.limit)
        if data is not None:
            results += held_out_loss(loaded, data, control)
    except HopescaleError as error:  # met by all ranks alike
        error.repeated = not control.is_first
        raise
    return results


def context_of(loaded: Loaded, wanted: Wanted) -> int | None:
    """Return how many tokens are read at most before one that is predicted; None is all there are."""
    if wanted.context is None and loaded.config.model.mixer == "attention":
        return loaded.config.train.seq_len
    return wanted.context
