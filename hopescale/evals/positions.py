"""Held-out text by the place in the context: does a model use tokens far back?

Rows are windows of the held-out stream. The place of a token counts from the beginning of its document, or of the row
if the document began before: what lies before a document tells nothing about it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from hopescale.common.errors import ConfigError, DataError
from hopescale.config.schema import DataConfig
from hopescale.data.loader import Batch, Data, open_data
from hopescale.evals.distribute import Tell, distribute, silent
from hopescale.evals.suite_request import LENGTHS
from hopescale.evals.suite_result import PositionResult
from hopescale.evals.suites import BATCH_TOKENS, judge
from hopescale.infer.adaptation import Adaptation
from hopescale.infer.load import LoadedModel
from hopescale.parallel.control import Control

FIRST_PART = 64
"""Places of the first part of a row; each further part has as many as all before it."""


def open_rows(loaded: LoadedModel, config: DataConfig, length: int | None) -> tuple[Data, int]:
    """Open held-out text in rows of `length` tokens; None is the longest of a few that it has.

    Raises:
        ConfigError: If no row is so long, or the data does not fit the model.
        DataError: If files are missing or damaged, or nothing is held out.
    """
    trained = loaded.config.train.seq_len
    lengths = [factor * trained for factor in reversed(LENGTHS)] if length is None else [length]
    for number, wanted in enumerate(lengths):
        try:
            data = open_data(config, seq_len=wanted, vocab_size=loaded.config.model.vocab_size)
        except ConfigError:
            if number == len(lengths) - 1:
                raise
            continue
        if not data.validation_sets:
            raise DataError("there is no held-out text", "prepare the text with --validation, or give --data")
        return data, wanted
    raise AssertionError("one of the lengths has opened or failed")


def measure_positions(
    loaded: LoadedModel,
    data: Data,
    length: int,
    num_rows: int,
    control: Control,
    adaptation: Adaptation | None = None,
    tell: Tell = silent,
) -> list[PositionResult]:
    """Measure the mean loss of each part of the rows, of every held-out set, levels following if `adaptation` says."""
    results, size = [], max(1, BATCH_TOKENS // length)
    for name in data.validation_sets:
        batches = list(data.validation(name, num_rows * length, 1))
        groups = [list(range(start, min(start + size, len(batches)))) for start in range(0, len(batches), size)]

        def work(numbers: list[int], batches: list[Batch] = batches) -> list[np.ndarray]:
            return losses_of(loaded, [batches[number] for number in numbers], adaptation)

        losses = np.stack(distribute(control, groups, work, tell))
        documents = np.concatenate([batch.document_ids.numpy() for batch in batches])
        places = list(by_place(losses, documents))
        results.append(PositionResult(name, length, len(losses), places))
    return results


def losses_of(loaded: LoadedModel, batches: Sequence[Batch], adaptation: Adaptation | None = None) -> list[np.ndarray]:
    """Return the loss of each target `[T]` of each row, NaN where there is none; levels follow if `adaptation` says.

    Documents of a row are read apart where the model keeps to `within_documents`.
    """
    tokens, targets, documents = (
        np.concatenate([getattr(batch, part).numpy() for batch in batches])
        for part in ("tokens", "targets", "document_ids")
    )
    if not loaded.config.model.within_documents:
        return [judged.loss for judged in judge(loaded.model, tokens, targets, adaptation)]
    losses = []
    for read, wanted, ids in zip(tokens, targets, documents, strict=True):
        borders = np.flatnonzero(np.diff(ids)) + 1
        pieces = zip(np.split(read, borders), np.split(wanted, borders), strict=True)
        apart = (judge(loaded.model, *(each[None] for each in pair), adaptation)[0] for pair in pieces)
        losses.append(np.concatenate([judged.loss for judged in apart]))
    return losses


def by_place(losses: np.ndarray, document_ids: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """Yield first and last place of each part, and the mean loss there, of those that hold a target.

    Args:
        losses: Loss of each target, NaN where there is none, `[rows, T]`.
        document_ids: Document of each token, `[rows, T]`.
    """
    numbers = np.broadcast_to(np.arange(losses.shape[1]), losses.shape)
    begins = np.diff(document_ids, axis=1, prepend=document_ids[:, :1] - 1) != 0
    places = numbers - np.maximum.accumulate(np.where(begins, numbers, 0), axis=1)
    for low, high in parts(losses.shape[1]):
        held = losses[(places >= low) & (places < high) & ~np.isnan(losses)]
        if held.size:
            yield low, high - 1, float(held.mean())


def parts(length: int) -> Iterator[tuple[int, int]]:
    """Cut `[0, length)` at 64, 128, 256 and so on."""
    low, high = 0, FIRST_PART
    while low < length:
        yield low, min(high, length)
        low, high = high, 2 * high
