"""A model asked the tasks of a suite: its answers, its confidence in the right ones, and the places where it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hopescale.config.schema import SuiteConfig
from hopescale.data.samples import Rows
from hopescale.data.suite_samples import SuiteSamples
from hopescale.evals.distribute import Tell, distribute, group_by_length, silent
from hopescale.evals.scoring import Scored, score
from hopescale.evals.suite_request import own_tasks
from hopescale.evals.suite_result import PLACES, SuiteResult
from hopescale.infer.adaptation import Adaptation
from hopescale.infer.generate import PREFILL_TOKENS
from hopescale.infer.in_context import InContextReader
from hopescale.infer.load import LoadedModel
from hopescale.models import Model
from hopescale.parallel.control import Control
from hopescale.parallel.layers import IGNORED_TARGET
from hopescale.suites import prose
from hopescale.suites.registry import TASKS, resolve
from hopescale.suites.task import Example, Settings, Task

BATCH_TOKENS = 8192
"""Tokens read at once, all rows together."""
SEED = 0
"""Seed of the examples: all models are asked the same, but for what their own seed of data decides (`Task.table`)."""


class Judged(NamedTuple):
    """One example, answered. Both of shape `[T]`, NaN where nothing is asked."""

    right: np.ndarray
    """1 where the right answer is the likeliest, else 0."""
    loss: np.ndarray
    """Nats of surprise about the right answer."""


@torch.no_grad()
def judge(model: Model, tokens: np.ndarray, targets: np.ndarray, adaptation: Adaptation | None = None) -> list[Judged]:
    """Read rows, and compare with the right answers. `[B, T]` both, int64; `IGNORED_TARGET` where nothing is asked.

    With `adaptation` levels follow each row: they learn from the answers that stand in it as the next tokens.
    """
    device, parts, place = next(model.parameters()).device, [], 0
    read, wanted = (torch.from_numpy(array).to(device) for array in (tokens, targets))
    for logits in _plainly(model, read) if adaptation is None else _following(model, read, wanted, adaptation):
        answers = wanted[:, place : place + logits.shape[1]]
        place += logits.shape[1]
        chances = logits.float().log_softmax(-1)
        loss = -chances.gather(-1, answers.clamp(min=0)[..., None])[..., 0]
        right = (chances.argmax(-1) == answers).float()
        asked = answers != IGNORED_TARGET
        parts.append([torch.where(asked, values, torch.nan).cpu() for values in (right, loss)])
    right, loss = (torch.cat(values, 1).double().numpy() for values in zip(*parts, strict=True))
    return [Judged(*pair) for pair in zip(right, loss, strict=True)]


def _plainly(model: Model, tokens: Tensor) -> Iterator[Tensor]:
    state = None
    for part in tokens.split(PREFILL_TOKENS, 1):
        logits, state = model(part, state)
        yield logits


def _following(model: Model, tokens: Tensor, targets: Tensor, adaptation: Adaptation) -> Iterator[Tensor]:
    stands = F.pad(targets[:, :-1] == tokens[:, 1:], (0, 1))
    return InContextReader(model, adaptation, len(tokens)).read(tokens, targets.where(stands, IGNORED_TARGET))


def ask(
    loaded: LoadedModel,
    points: Sequence[SuiteConfig],
    num_examples: int,
    control: Control,
    report: Callable[[str], None],
    adaptation: Adaptation | None = None,
    tell: Tell = silent,
) -> list[SuiteResult]:
    """Ask a model so many examples of each point.

    They are ids, or words if the model has a tokenizer and was not trained on the task; `adaptation` is for ids. Called
    by all ranks; results do not depend on them.
    """
    results = []
    for point in points:
        samples = SuiteSamples(point, seed=loaded.config.data.seed, split="test", seq_len=point.length, examples=SEED)
        if loaded.tokenizer is not None and point.task not in own_tasks(loaded.config):
            results.append(_in_words(loaded, point, samples.read(range(num_examples)), control, tell))
        else:
            results.append(_in_ids(loaded, point, samples, num_examples, control, adaptation, tell))
        done = results[-1]
        report(f"{point.task} of length {point.length}: {done.accuracy:.3f} of {done.questions:,} answers are right")
    return results


def _in_ids(
    loaded: LoadedModel,
    point: SuiteConfig,
    samples: SuiteSamples,
    num_examples: int,
    control: Control,
    adaptation: Adaptation | None,
    tell: Tell,
) -> SuiteResult:
    size = max(1, BATCH_TOKENS // point.length)
    batches = [list(range(start, min(start + size, num_examples))) for start in range(0, num_examples, size)]

    def work(numbers: list[int]) -> list[Judged]:
        rows = samples.read(numbers)
        return judge(loaded.model, rows.tokens, rows.targets, adaptation)

    return _result(point, samples.read(range(num_examples)), distribute(control, batches, work, tell))


def _in_words(loaded: LoadedModel, point: SuiteConfig, rows: Rows, control: Control, tell: Tell) -> SuiteResult:
    """Ask in text. Words that are asked one after the other are one answer, noted at the place of its last word."""
    task, settings = TASKS[point.task], resolve(point)
    questions = [(row, *ends) for row, targets in enumerate(rows.targets) for ends in answers_of(targets)]
    texts, counts = [], []
    for row, first, last in questions:
        read, answer = rows.tokens[row, : first + 1], rows.targets[row, first : last + 1]
        words = [task.spell(int(word), settings) for word in (*read, *answer)]
        context, whole = (loaded.tokenizer.encode(prose.text_of(part)) for part in (words[: first + 1], words))
        texts.append([loaded.tokenizer.eos_id, *whole])
        counts.append(max(1, len(whole) - len(context)))

    def work(numbers: list[int]) -> list[Scored]:
        return score(loaded.model, [texts[number] for number in numbers], [counts[number] for number in numbers])

    scored = distribute(control, group_by_length(list(map(len, texts)), tokens=BATCH_TOKENS), work, tell)
    judged = [Judged(*np.full((2, point.length), np.nan)) for _ in rows.targets]
    for (row, _, last), (logprob, greedy) in zip(questions, scored, strict=True):
        judged[row].right[last], judged[row].loss[last] = greedy, -logprob
    found = _result(point, rows, judged)
    words_of_one = 1 + questions[0][2] - questions[0][1]
    return replace(found, settings={**found.settings, "unit": "words"}, chance=found.chance**words_of_one)


def answers_of(targets: np.ndarray) -> Iterator[tuple[int, int]]:
    """List the first and the last place of each run of targets. `[T]`, `IGNORED_TARGET` where nothing is asked."""
    edges = np.flatnonzero(np.diff(targets != IGNORED_TARGET, prepend=False, append=False))
    yield from ((int(first), int(end) - 1) for first, end in zip(edges[::2], edges[1::2], strict=True))


def _chance(task: Task, rows: Rows, asked: np.ndarray, settings: Settings) -> float:
    """Return the accuracy of guessing in these rows, at the places that are `asked`, `[examples, T]`."""
    if task.chance is not None:
        return task.chance(settings)
    if task.choices is None:
        return float(np.unique(rows.targets[asked], return_counts=True)[1].max() / asked.sum())
    counts = np.stack([task.choices(Example(*pair), settings) for pair in zip(rows.tokens, rows.targets, strict=True)])
    return float((1 / counts[asked]).mean())


def _result(point: SuiteConfig, rows: Rows, judged: Sequence[Judged]) -> SuiteResult:
    """Put examples together."""
    right, loss = (np.stack(values) for values in zip(*judged, strict=True))
    asked = ~np.isnan(right)
    per_row, counts = np.nansum(right, 1), asked.sum(1)
    accuracy = per_row.sum() / counts.sum()
    spread = np.sqrt(((per_row - accuracy * counts) ** 2).sum()) / counts.sum()
    last = right[np.arange(len(right)), asked.shape[1] - 1 - asked[:, ::-1].argmax(1)]
    settings, task = resolve(point), TASKS[point.task]
    edges = np.linspace(0, right.shape[1], min(PLACES, right.shape[1]) + 1).astype(int)
    places = [
        (int(low), int(high) - 1, float(np.nanmean(right[:, low:high])))
        for low, high in zip(edges, edges[1:], strict=False)
        if asked[:, low:high].any()
    ]
    return SuiteResult(
        task=point.task,
        settings={"length": point.length, **settings},
        examples=len(right),
        questions=int(asked.sum()),
        accuracy=float(accuracy),
        stderr=float(spread),
        exact=float((per_row == counts).mean()),
        last=float(last.mean()),
        loss=float(np.nansum(loss) / asked.sum()),
        chance=_chance(task, rows, asked, settings),
        best=task.best(settings),
        places=places,
    )
