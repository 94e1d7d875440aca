"""Which levels follow the text that is read, and how often they step (Nested Learning, 9.1). Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from hopescale.common.errors import ConfigError
from hopescale.common.units import parse_count
from hopescale.config.model_shape import by_period
from hopescale.config.schema import ModelConfig

RATE = 0.1
"""Learning rate of a level, if nothing else is said."""
HINT = "as in fast=512,slow=2048, tokens of a period; fast=512@0.5 has a learning rate of its own"


@dataclass(frozen=True)
class InContextLevel:
    """How a level follows the text.

    Attributes:
        period: Tokens between two steps of the level (`update_every_tokens`).
        rate: Learning rate of a step, which follows the gradient of the mean loss of the period's tokens.
    """

    period: int
    rate: float = RATE


@dataclass(frozen=True)
class Adaptation:
    """The in-context cadence: each level takes one step a period, on the next-token loss of its tokens.

    Attributes:
        levels: Levels that follow the text, by name; their number of tokens decides which is fast, and which slow.
        nested: Whether a level returns to its trained weights whenever the next slower one steps (Eq. 72).

    Raises:
        ConfigError: If no level is named, `nested` has no effect, or periods are no multiples of each other there.
    """

    levels: dict[str, InContextLevel]
    nested: bool = False

    def __post_init__(self) -> None:
        if not self.levels:
            raise ConfigError("no level is named that follows the text", HINT)
        if not self.nested:
            return
        if len(self.levels) < 2:
            only = next(iter(self.levels))
            raise ConfigError(f"--nested has no effect: {only} alone follows the text", "name a slower level, too")
        for (fast, below), (slow, above) in pairwise(self.fast_to_slow()):
            if above.period % below.period or above.period == below.period:
                message = f"--nested: {slow} steps every {above.period} tokens, {fast} every {below.period}"
                raise ConfigError(message, "a period must be a multiple of the next faster level's, and longer")

    def fast_to_slow(self) -> list[tuple[str, InContextLevel]]:
        """Return the levels by their periods."""
        return sorted(self.levels.items(), key=lambda item: item[1].period)

    def moving(self) -> dict[str, InContextLevel]:
        """Return the levels that must be followed, fast to slow: a rate of 0 leaves a level as it is trained.

        With `nested` a level of rate 0 still says when faster ones return.
        """
        some = any(level.rate > 0 for level in self.levels.values())
        return {name: level for name, level in self.fast_to_slow() if level.rate > 0 or (self.nested and some)}

    def check(self, model: ModelConfig) -> None:
        """Refuse levels that a model does not have.

        Raises:
            ConfigError: If there are such.
        """
        known = [name for name, _ in by_period(model.cms.levels)]
        if unknown := [name for name in self.levels if name not in known]:
            have = f"has the levels {', '.join(known)}" if known else "has no levels"
            raise ConfigError(f"{', '.join(unknown)} cannot follow the text: the model {have}", HINT)

    def describe(self) -> dict[str, object]:
        """Return all settings as JSON can carry them."""
        levels = {name: {"period": level.period, "rate": level.rate} for name, level in self.fast_to_slow()}
        return {"levels": levels, "nested": self.nested}


def adaptation_of(model: ModelConfig, *, rate: float | None = None, nested: bool = False) -> Adaptation:
    """Return the in-context cadence that a model's own config has (`update_every_tokens`).

    Raises:
        ConfigError: If it has none, or a setting is out of range.
    """
    found = by_period(model.cms.levels)
    given = [f"{name}={level.update_every_tokens}" for name, level in found if level.update_every_tokens is not None]
    if not given:
        message = "the model's config says of no level when it follows a text: no level has update_every_tokens"
        raise ConfigError(message, "say it here: --levels fast=512,slow=2048")
    return read_adaptation("update_every_tokens", ",".join(given), rate=rate, nested=nested)


def read_adaptation(option: str, text: str, *, rate: float | None = None, nested: bool = False) -> Adaptation:
    """Read `fast=512,slow=2Ki@0.5`.

    Args:
        option: Name of the option in messages.
        text: Value of the option.
        rate: Learning rate of levels that have none of their own; None is `RATE`.
        nested: Whether levels return to their trained weights.

    Raises:
        ConfigError: If a part is no level with a period, a level comes twice, or a rate is out of range.
    """
    if rate is not None and not 0 <= rate < math.inf:
        raise ConfigError(f"--rate is {rate}, but must be 0 (no adaptation) or a number above")
    found: dict[str, InContextLevel] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, cadence = (piece.strip() for piece in part.partition("="))
        period, given, own = (piece.strip() for piece in cadence.partition("@"))
        try:
            level = InContextLevel(parse_count(period), float(own) if given else RATE if rate is None else rate)
        except ValueError:
            raise ConfigError(f"{option} has {part!r}, which is no level with a period", HINT) from None
        if not name or level.period < 1 or not 0 <= level.rate < math.inf:
            raise ConfigError(f"{option} has {part!r}: a period is at least 1, a rate at least 0", HINT)
        if name in found:
            raise ConfigError(f"{option} names {name} more than once")
        found[name] = level
    return Adaptation(found, nested)
