"""The tasks of suites that are asked, and their settings: from the command line, and from a model's own sources.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from hopescale.common.errors import ConfigError, Problem
from hopescale.config.schema import RunConfig, SuiteConfig
from hopescale.suites.registry import GROUPS, TASKS, num_ids, problems, resolve
from hopescale.suites.two_languages import NAMES

TRAINED = "trained"
"""The suite of all tasks that are sources of the run."""
POSITION = "position"
"""The suite that measures held-out text by the place in the context."""
EXAMPLES = 128
"""Examples of each point, if nothing else is said."""
LENGTHS = (1, 2, 4)
"""Lengths, in lengths of the training, if nothing else is said."""
UNTRAINED_LENGTH = 64
"""Tokens of an example of a task that the model was not trained on, where it fits."""


@dataclass(frozen=True)
class SuiteRequest:
    """Tasks and the settings that are varied.

    Raises:
        ConfigError: If a name is unknown, or a setting has no effect.
    """

    names: tuple[str, ...]
    """Names of tasks and groups, `trained`, and `position`."""
    lengths: tuple[int, ...] = ()
    """Tokens of an example; empty is once, twice and four times the length of the training."""
    pairs: tuple[int, ...] = ()
    """Values of `num_pairs`; empty is what the model was trained on, or the task's own."""
    distances: tuple[int, ...] = ()
    """Values of `distance`; empty likewise."""
    examples: int = EXAMPLES
    """Examples of each point; rows of text of `position`."""

    def __post_init__(self) -> None:
        known = (*TASKS, *GROUPS, TRAINED, POSITION)
        if unknown := [name for name in self.names if name not in known]:
            hint = f"suites are {TRAINED}, {POSITION}, {', '.join(GROUPS)}; tasks are {', '.join(TASKS)}"
            raise ConfigError(f"--suite names {', '.join(unknown)}, which is no suite and no task of one", hint)
        if not self.names and (self.lengths or self.pairs or self.distances):
            raise ConfigError("--length, --pairs and --distance have no effect without --suite", "leave them out")
        if set(self.names) == {POSITION} and (self.pairs or self.distances):
            raise ConfigError(f"--pairs and --distance have no effect on {POSITION}", "leave them out")

    @property
    def by_position(self) -> bool:
        """Whether held-out text is measured by the place in the context."""
        return POSITION in self.names

    def points(self, config: RunConfig, *, words: bool = False) -> list[SuiteConfig]:
        """Return the tasks that a model of this config is asked, each with its length and its own settings.

        Args:
            config: Config of the run.
            words: Whether the model has a tokenizer: it reads words, but for tasks that it was trained on, in ids.

        Raises:
            ConfigError: If a task does not fit the model or its settings; carries every problem.
        """
        own = own_tasks(config)
        tasks = self._tasks(own)
        for option, name, values in (("--pairs", "num_pairs", self.pairs), ("--distance", "distance", self.distances)):
            if values and tasks and not any(name in TASKS[task].defaults for task in tasks):
                raise ConfigError(f"{option} has no effect: {', '.join(tasks)} have no {name}", "leave it out")
        in_words = {task for task in tasks if words and task not in own}
        if unread := [task for task in tasks if task in in_words and TASKS[task].spell is None]:
            hint = f"those with words are {', '.join(name for name, task in TASKS.items() if task.spell)}"
            raise ConfigError(f"the model reads text, and {', '.join(unread)} have no words", hint)
        found, faults = [], []
        for task in tasks:
            trained = config.train.seq_len if task in own else None
            for point in self._of_task(own.get(task, SuiteConfig(task=task)), trained):
                size = num_ids(point) if task in in_words else config.model.vocab_size
                wrong = problems(point, seq_len=point.length, vocab_size=size)
                faults += [Problem(f"{task} of length {point.length}", f"{key}: {message}") for key, message in wrong]
                found.append(point)
        if faults:
            raise ConfigError(list(dict.fromkeys(faults)))
        return found

    def _tasks(self, own: dict[str, SuiteConfig]) -> list[str]:
        """Return tasks by name, each once."""
        tasks: list[str] = []
        for name in self.names:
            if name == TRAINED and not own:
                raise ConfigError(f"--suite {TRAINED}, but no source of the run is a suite's task", "name the tasks")
            if name != POSITION:
                tasks += [name] if name in TASKS else own if name == TRAINED else GROUPS[name]
        return list(dict.fromkeys(tasks))

    def _of_task(self, base: SuiteConfig, trained: int | None) -> Iterator[SuiteConfig]:
        """Vary the settings that the task has."""
        has = TASKS[base.task].defaults
        pairs = self.pairs if "num_pairs" in has else ()
        distances = self.distances if "distance" in has else ()
        languages = NAMES if "language" in has else ()
        one = base.length or trained
        for count, distance, language in product(pairs or (None,), distances or (None,), languages or (None,)):
            varied = {"num_pairs": count, "distance": distance, "language": language}
            point = replace(base, **{name: value for name, value in varied.items() if value is not None})
            least = TASKS[base.task].shortest(resolve(point))
            usual = max(one or UNTRAINED_LENGTH, least)
            lengths: Sequence[int] = [usual] if pairs or distances else [factor * usual for factor in LENGTHS]
            lengths = sorted(self.lengths) or lengths
            for below, length in zip((0, *lengths), lengths, strict=False):
                bin_of = {"shortest": below + 1} if below and "shortest" in has else {}
                yield replace(point, length=length, **bin_of)


def own_tasks(config: RunConfig) -> dict[str, SuiteConfig]:
    """Return the tasks that a run was trained on, by name."""
    sources = config.data.sources.values()
    return {source.suite.task: source.suite for source in sources if source.suite is not None}


def read_counts(option: str, text: str) -> tuple[int, ...]:
    """Read `64,128` as numbers.

    Raises:
        ConfigError: If a part is none, or comes twice.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if wrong := [part for part in parts if not part.isdecimal()]:
        raise ConfigError(f"{option} has {wrong[0]!r}, which is no count", f"as in {option} 64,128")
    numbers = tuple(map(int, parts))
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"{option} has a number more than once: {text}")
    return numbers
