"""Held-out text by the place in the context: does a model use what lies far back?

Rows are windows of the held-out stream, which may hold several documents; a row's first token has no context.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from hopescale.common.errors import ConfigError, DataError
from hopescale.config.schema import DataConfig
from hopescale.data.loader import Data, open_data
from hopescale.evals.distribute import distribute
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
) -> list[PositionResult]:
    """Measure the mean loss of each part of the rows, of every held-out set, levels following if `adaptation` says."""
    results, size = [], max(1, BATCH_TOKENS // length)
    for name in data.validation_sets:
        batches = list(data.validation(name, num_rows * length, 1))
        groups = [list(range(start, min(start + size, len(batches)))) for start in range(0, len(batches), size)]

        def work(numbers: list[int], batches: list = batches) -> list[np.ndarray]:
            tokens, targets = (
                np.concatenate([getattr(batches[number], part).numpy() for number in numbers])
                for part in ("tokens", "targets")
            )
            return [judged.loss for judged in judge(loaded.model, tokens, targets, adaptation)]

        losses = np.stack(distribute(control, groups, work))
        places = [
            (low, high - 1, float(np.nanmean(losses[:, low:high])))
            for low, high in parts(length)
            if not np.isnan(losses[:, low:high]).all()
        ]
        results.append(PositionResult(name, length, len(losses), places))
    return results


def parts(length: int) -> Iterator[tuple[int, int]]:
    """Cut `[0, length)` at 64, 128, 256 and so on."""
    low, high = 0, FIRST_PART
    while low < length:
        yield low, min(high, length)
        low, high = high, 2 * high
