"""All tasks by name, groups of them, and the settings of one: checked, and filled with the task's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from hopescale.config.schema import SuiteConfig
from hopescale.suites import classes, facts, formal, mad, mqar, needles, state_tracking, two_languages
from hopescale.suites.task import Example, Fault, Task

TASKS: dict[str, Task] = {
    **mqar.TASKS,
    **needles.TASKS,
    **facts.TASKS,
    **mad.TASKS,
    **formal.TASKS,
    **state_tracking.TASKS,
    **classes.TASKS,
    **two_languages.TASKS,
}
"""Every task by its name."""
GROUPS: dict[str, tuple[str, ...]] = {
    "recall": (*mqar.TASKS, *needles.TASKS, "noisy_recall", "fuzzy_recall"),
    "needles": tuple(needles.TASKS),
    "long": (*needles.TASKS, *facts.TASKS),
    "mad": tuple(mad.TASKS),
    "formal": tuple(formal.TASKS),
    "state": ("parity", *state_tracking.TASKS),
    "continual": (*classes.TASKS, *two_languages.TASKS),
    "all": tuple(TASKS),
}
"""Names for several tasks."""
Split = Literal["train", "validation", "test"]
_STREAMS = {"train": 0, "validation": 1, "table": 2, "test": 3}
_NOT_SETTINGS = ("task", "length", "num_samples")


def given(config: SuiteConfig) -> dict[str, Any]:
    """Return the settings of a config that are not null."""
    return {name: value for name, value in asdict(config).items() if name not in _NOT_SETTINGS and value is not None}


def resolve(config: SuiteConfig) -> dict[str, Any]:
    """Return all settings of a task: the config's, else the task's own."""
    return {**TASKS[config.task].defaults, **given(config)}


def problems(config: SuiteConfig, *, seq_len: int, vocab_size: int) -> list[Fault]:
    """Check a task's settings, alone and with the model's sizes: pairs of a setting's name and its problem."""
    task = TASKS[config.task]
    known = ", ".join(("length", *task.defaults))
    if idle := [name for name in given(config) if name not in task.defaults]:
        return [(name, f"has no effect: the settings of {config.task} are {known}") for name in idle]
    settings, length = resolve(config), config.length or seq_len
    if faults := list(task.faults(settings)):
        return faults
    found = []
    if length > seq_len:
        found.append(("length", f"{length} exceeds train.seq_len = {seq_len}"))
    if (least := task.shortest(settings)) > length:
        where = "length" if config.length else "task"
        found.append((where, f"{config.task} with these settings needs {least} tokens, an example has {length}"))
    if (needed := num_ids(config)) > vocab_size:
        found.append(("task", f"{config.task} has {needed} symbols, but model.vocab_size is {vocab_size}"))
    return found


def num_ids(config: SuiteConfig) -> int:
    """Count the symbols of a task and the one that fills rows up."""
    return TASKS[config.task].num_ids(resolve(config))


class Generated:
    """The examples of one task and one seed."""

    def __init__(self, config: SuiteConfig, *, seed: int, length: int):
        """Draw the parts that all examples share; `problems` must have found none."""
        self.task, self.settings, self.length = TASKS[config.task], resolve(config), length
        table = self.task.table
        self.table = None if table is None else table(generator_of(seed, "table"), self.settings)

    def examples(self, split: Split, numbers: Sequence[int], *, seed: int) -> list[Example]:
        """Make examples: each is a function of the seed, the split and its number."""
        generators = (generator_of(seed, split, number) for number in numbers)
        return [self.task.make(generator, self.length, self.settings, self.table) for generator in generators]


def generator_of(seed: int, stream: str, *number: int) -> np.random.Generator:
    """Return the random generator of an example, or of the parts that all examples share."""
    sequence = np.random.SeedSequence(seed, spawn_key=(_STREAMS[stream], *number))
    return np.random.Generator(np.random.Philox(sequence))
