"""The measurements that the command line asks for. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hopescale.common.errors import ConfigError
from hopescale.evals.suite_request import SuiteRequest
from hopescale.infer.adaptation import Adaptation

PERPLEXITY = "perplexity"
"""The task that is ours."""
NO_SUITE = SuiteRequest(())
"""Nothing that is generated."""


@dataclass(frozen=True)
class EvalRequest:
    """The measurements that are asked for.

    Raises:
        ConfigError: If nothing is, or a setting has no effect.
    """

    tasks: dict[str, int | None]
    """Tasks of lm-eval, with the number of solved examples before each question; None is the task's own."""
    task_path: Path | None = None
    """Folder of tasks beside lm-eval's."""
    perplexity: bool = False
    """Whether the loss on held-out shards is measured."""
    data: Path | None = None
    """Prepared folder to measure it on; None takes the sources of the run."""
    limit: int | None = None
    """Questions of each task; None is all."""
    context: int | None = None
    """Tokens read at most before one that is predicted; None is all for a model whose state does not grow, and
    `train.seq_len` for attention."""
    suite: SuiteRequest = NO_SUITE
    """Generated tasks that are asked, and held-out text that is read by place."""
    adaptation: Adaptation | None = None
    """Levels that follow each row that is read, from the trained weights on; None follows none."""

    def __post_init__(self) -> None:
        if not self.tasks and not self.perplexity and not self.suite.names:
            hint = f"name --tasks, as --tasks {PERPLEXITY}, --suite, or --data for the loss on it"
            raise ConfigError("there is nothing to evaluate", hint)
        if self.tasks and self.adaptation is not None:
            message = f"--adapt follows streams: {PERPLEXITY} and suites; {', '.join(self.tasks)} are single texts"
            raise ConfigError(message, "evaluate these without --adapt, or with --levels of `hopescale adapt`")
        if not self.tasks:
            limit = None if self.suite.names else self.limit
            given = {"--task-path": self.task_path, "--limit": limit, "--context": self.context}
            if idle := [name for name, value in given.items() if value is not None]:
                message = f"{', '.join(idle)}: no effect without a task of lm-eval; {PERPLEXITY} reads as training does"
                raise ConfigError(message, "leave it out")

    @classmethod
    def read(
        cls, tasks: Sequence[str], data: Path | None, suite: SuiteRequest = NO_SUITE, **settings: object
    ) -> EvalRequest:
        """Read names of tasks, `arc_easy` or `arc_easy=5` for five examples before each question.

        Raises:
            ConfigError: If a number of examples is none, or a task is named twice.
        """
        shots: dict[str, int | None] = {}
        for part in tasks:
            name, given, number = (piece.strip() for piece in part.partition("="))
            if not name or (given and not number.isdecimal()) or (given and name == PERPLEXITY):
                hint = "NAME, or NAME=5 for five examples before each question"
                raise ConfigError(f"--tasks has {part!r}, which is no task of lm-eval with a number of examples", hint)
            if name in shots:
                raise ConfigError(f"--tasks names {name} more than once")
            shots[name] = int(number) if given else None
        ours = PERPLEXITY in shots or (data is not None and not suite.by_position)
        shots.pop(PERPLEXITY, None)
        return cls(shots, perplexity=ours, data=data, suite=suite, **settings)
