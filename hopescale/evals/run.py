"""An evaluation: all that it reads is opened before anything is computed, then the model is measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hopescale.common.errors import ConfigError, DataError, HopescaleError
from hopescale.config.model_shape import sees_all
from hopescale.config.schema import DataConfig, SourceConfig, SuiteConfig
from hopescale.data.loader import Data, open_data
from hopescale.engine.schedule import Loop, plain_backward
from hopescale.engine.segments import Segments
from hopescale.engine.step import num_targets
from hopescale.evals.distribute import Tell, distribute, silent
from hopescale.evals.following import following_loss
from hopescale.evals.positions import measure_positions, open_rows
from hopescale.evals.report import Measurements, TaskResult
from hopescale.evals.request import PERPLEXITY, EvalRequest
from hopescale.evals.suite_request import own_tasks
from hopescale.evals.suite_result import PositionResult, SuiteResult
from hopescale.evals.suites import ask
from hopescale.infer.adaptation import Adaptation
from hopescale.infer.load import LoadedModel
from hopescale.parallel.control import Control


class Prepared(NamedTuple):
    """Inputs of an evaluation, opened before anything is computed."""

    data: Data | None
    """Held-out data of the loss."""
    tasks: dict[str, Any]
    """Tasks of lm-eval."""
    points: list[SuiteConfig]
    """Points of suites."""
    rows: tuple[Data, int] | None
    """Held-out data in rows that are read by place, and their length."""


def evaluate(
    loaded: LoadedModel,
    request: EvalRequest,
    control: Control,
    report: Callable[[str], None],
    tell: Tell = silent,
) -> Measurements:
    """Measure a model, which is whole on every rank. Called by all ranks, with results that do not depend on them.

    `report` takes lines about what is done, `tell` counts; those of the first rank stand for all.

    Raises:
        ConfigError: If a task is unknown or needs something that is not there, or the model has no tokenizer for text.
        DataError: If data is missing or damaged.
    """
    data, tasks, points, rows = control.all_ranks_or_raise(lambda: _prepared(loaded, request))
    results: list[TaskResult] = []
    suites: list[SuiteResult] = []
    positions: list[PositionResult] = []
    try:
        if request.tasks:
            from hopescale.evals.language_model import EvaluatedModel
            from hopescale.evals.tasks import run_tasks

            model = EvaluatedModel(loaded, control, context_of(loaded, request), report, tell)
            results += run_tasks(model, tasks, request.limit)
        if data is not None:
            results += _held_out_loss(loaded, data, control, request.adaptation, tell)
        if points:
            suites = ask(loaded, points, request.suite.examples, control, report, request.adaptation, tell)
        if rows is not None:
            positions = measure_positions(loaded, *rows, request.suite.examples, control, request.adaptation, tell)
    except HopescaleError as error:  # met by all ranks alike
        error.repeated = not control.is_first
        raise
    return Measurements(results, suites, positions)


def _prepared(loaded: LoadedModel, request: EvalRequest) -> Prepared:
    """Open all that will be read, before anything is computed."""
    if request.tasks and loaded.tokenizer is None:
        message = f"{loaded.folder} has no tokenizer, so it cannot be asked {', '.join(request.tasks)}, which are text"
        raise ConfigError(message, f"--tasks {PERPLEXITY} needs none")
    data, tasks = _open_held_out(loaded, request.data) if request.perplexity else None, {}
    if request.tasks:
        from hopescale.evals.tasks import load_tasks

        tasks = load_tasks(request.tasks, request.task_path)
    points = request.suite.points(loaded.config, words=loaded.tokenizer is not None)
    if request.adaptation is not None:
        request.adaptation.check(loaded.config.model)
        words = {point.task for point in points} - own_tasks(loaded.config).keys()
        if words and loaded.tokenizer is not None:
            message = f"--adapt follows streams, but {', '.join(sorted(words))} are asked in words, one by one"
            raise ConfigError(message, "ask these without --adapt")
    rows = None
    if request.suite.by_position:
        rows = open_rows(loaded, _sources(loaded, request.data), max(request.suite.lengths, default=None))
        _check_tokenizer(loaded, rows[0])
    return Prepared(data, tasks, points, rows)


def context_of(loaded: LoadedModel, request: EvalRequest) -> int | None:
    """Return how many tokens are read at most before one that is predicted; None is all there are."""
    model = loaded.config.model
    grows = any(map(sees_all, model.mixers.values()))
    if request.context is None and grows:
        return loaded.config.train.seq_len
    return request.context


def _open_held_out(loaded: LoadedModel, folder: Path | None) -> Data:
    """Open the sources of a run, or one prepared folder in their place.

    Raises:
        ConfigError: If the data does not fit the model.
        DataError: If files are missing or damaged, nothing is held out, or the tokens are of another tokenizer.
    """
    config = _sources(loaded, folder)
    data = open_data(config, seq_len=loaded.config.train.seq_len, vocab_size=loaded.config.model.vocab_size)
    if not data.validation_sets:
        hint = "prepare the text with --validation, or give another folder: --data"
        raise DataError(f"{', '.join(config.sources)} has no held-out text", hint)
    _check_tokenizer(loaded, data)
    return data


def _sources(loaded: LoadedModel, folder: Path | None) -> DataConfig:
    """Return the sources of a run, or one prepared folder in their place."""
    config = loaded.config.data
    if folder is None:
        return config
    return replace(config, sources={folder.resolve().name: SourceConfig(path=str(folder))})


def _check_tokenizer(loaded: LoadedModel, data: Data) -> None:
    """Refuse tokens of another tokenizer.

    Raises:
        DataError: If they are.
    """
    ours, theirs = (tokenizer and tokenizer.fingerprint[:12] for tokenizer in (loaded.tokenizer, data.tokenizer))
    if theirs is not None and ours != theirs:
        message = f"the data's tokenizer is {theirs}, but that of {loaded.folder} is {ours or 'none'}"
        raise DataError(message, "prepare the text with the model's tokenizer, which is in its folder")


def _held_out_loss(
    loaded: LoadedModel, data: Data, control: Control, adaptation: Adaptation | None, tell: Tell
) -> list[TaskResult]:
    """Measure each held-out set, as far as validation reads it.

    Batches are those of validation on one process, and are added up in their order: the numbers are those that a run
    on one process logs, whatever the number of ranks here.
    """
    train, device = loaded.config.train, next(loaded.model.parameters()).device
    passes = Loop(loaded.model, plain_backward, Segments(loaded.model.mesh, train.segments), device)
    follows = adaptation is not None and bool(adaptation.moving())
    results = []
    for name in data.validation_sets:
        batches = list(data.validation(name, train.validation.tokens, train.micro_batch_size))

        def work(numbers: list[int], batches: list = batches) -> list[Tensor]:
            if follows:
                return [torch.tensor(following_loss(loaded.model, batches[n], adaptation)) for n in numbers]
            return [passes.evaluate([batches[number]]).cpu() for number in numbers]

        sums = distribute(control, [[number] for number in range(len(batches))], work, tell)
        loss = float(sum(sums, torch.zeros(()))) / max(1, num_targets(batches))
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if (bits := data.bits_per_byte(name, loss)) is not None:
            metrics["bits_per_byte"] = bits
        samples = sum(len(batch.tokens) for batch in batches)
        results.append(TaskResult(f"perplexity/{name}", "", None, samples, metrics, {}))
    return results
