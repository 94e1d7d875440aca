"""The loss on held-out shards, equal to what a run logs of itself."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from hopescale.common.errors import DataError
from hopescale.config.schema import DataConfig
from hopescale.config.schema.data import SourceConfig
from hopescale.data.loader import Data, open_data
from hopescale.engine.schedule import Loop
from hopescale.engine.step import num_targets
from hopescale.evals.distribute import distribute
from hopescale.evals.report import TaskResult
from hopescale.infer.load import LoadedModel
from hopescale.parallel.control import Control


def open_held_out(loaded: LoadedModel, folder: Path | None) -> Data:
    """Open the sources of a run, or one prepared folder in their place.

    Raises:
        ConfigError: If the data does not fit the model.
        DataError: If files are missing or damaged, nothing is held out, or the tokens are of another tokenizer.
    """
    config: DataConfig = loaded.config.data
    if folder is not None:
        config = replace(config, sources={folder.resolve().name: SourceConfig(path=str(folder))})
    data = open_data(config, seq_len=loaded.config.train.seq_len, vocab_size=loaded.config.model.vocab_size)
    if not data.validation_sets:
        hint = "prepare the text with --validation, or give another folder: --data"
        raise DataError(f"{', '.join(config.sources)} has no held-out text", hint)
    ours, theirs = (tokenizer and tokenizer.fingerprint[:12] for tokenizer in (loaded.tokenizer, data.tokenizer))
    if theirs is not None and ours != theirs:
        message = f"the data's tokenizer is {theirs}, but that of {loaded.folder} is {ours or 'none'}"
        raise DataError(message, "prepare the text with the model's tokenizer, which is in its folder")
    return data


def held_out_loss(loaded: LoadedModel, data: Data, control: Control) -> list[TaskResult]:
    """Measure each held-out set, as far as validation reads it. Called by all ranks, with equal results.

    Batches are those of validation on one process, and are added up in their order: the numbers are those that a run
    on one process logs, whatever the number of ranks here.
    """
    train, device = loaded.config.train, next(loaded.model.parameters()).device
    passes = Loop(loaded.model, Tensor.backward, device)
    results = []
    for name in data.validation_sets:
        batches = list(data.validation(name, train.validation.tokens, train.micro_batch_size))

        def work(numbers: list[int], batches: list = batches) -> list[Tensor]:
            return [passes.evaluate([batches[number]]).cpu() for number in numbers]

        sums = distribute(control, [[number] for number in range(len(batches))], work)
        loss = float(sum(sums, torch.zeros(()))) / max(1, num_targets(batches))
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if (bits := data.bits_per_byte(name, loss)) is not None:
            metrics["bits_per_byte"] = bits
        samples = sum(len(batch.tokens) for batch in batches)
        results.append(TaskResult(f"perplexity/{name}", "", None, samples, metrics, {}))
    return results
