"""The exception family. One class per exit code of the command line; the text is the whole message a user sees."""

from __future__ import annotations

from dataclasses import dataclass


class HopescaleError(Exception):
    """A failure the user can act on: printed as one message, without a traceback.

    Args:
        message: Statement of what is wrong, with both values and where each came from. Lower case, no final full stop.
        hint: Advice on what to do about it.

    Attributes:
        repeated: Whether another rank of the same job says it, or says more.
    """

    exit_code = 1
    kind = "error"
    repeated = False

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.kind}\n  {self.message}"
        return f"{text}\n    hint: {self.hint}" if self.hint else text


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a config: the dotted key, what is wrong, where the value came from, what to do."""

    key: str
    message: str
    origin: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        text = f"  {self.key}: {self.message}"
        if self.origin:
            text += f"   [{self.origin}]"
        return f"{text}\n    hint: {self.hint}" if self.hint else text


class ConfigError(HopescaleError):
    """A recipe, an override or a command line that cannot be run. Carries every problem found, not the first."""

    exit_code = 2
    kind = "config error"

    def __init__(self, problems: list[Problem] | str, hint: str | None = None):
        self.problems = [] if isinstance(problems, str) else list(problems)
        super().__init__(problems if isinstance(problems, str) else f"{len(self.problems)} problems", hint)

    def __str__(self) -> str:
        if not self.problems:
            return super().__str__()
        count = len(self.problems)
        head = f"{self.kind} ({count} problem{'s' if count > 1 else ''})"
        return "\n".join([head, *map(str, self.problems)])


class DataError(HopescaleError):
    """Input text, a tokenizer or a shard that is missing, unreadable or not what it claims to be."""

    exit_code = 3
    kind = "data error"


class CheckpointError(HopescaleError):
    """A checkpoint that cannot be written, found, read, or does not fit the run."""

    exit_code = 4
    kind = "checkpoint error"


class LaunchError(HopescaleError):
    """Processes or jobs that cannot be started."""

    exit_code = 5
    kind = "launch error"


class DivergedError(HopescaleError):
    """Training produced a loss or gradient that must not reach the weights."""

    exit_code = 6
    kind = "diverged"


class StoppedEarly(HopescaleError):
    """The run was asked to stop, has saved its state, and continues with the same command."""

    exit_code = 75
    kind = "stopped"
