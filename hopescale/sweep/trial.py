"""One run of a sweep: its name, its config, and its cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hopescale.config.schema import RunConfig
from hopescale.cost.flops import flops_per_token
from hopescale.cost.params import count_params


@dataclass(frozen=True)
class Branch:
    """The place where a trial leaves the run that it shares with longer horizons of its size."""

    trunk: str
    """Name of the trial that it branches off."""
    step: int
    """Last step that it takes over."""


@dataclass(frozen=True)
class TrialChoice:
    """Choice that a trial depends on: candidates are trained, and other trials if their candidate is the best."""

    among: tuple[str, ...]
    """Names of the candidates, one for each value of the axis."""
    twin: str
    """Candidate with the same value as this trial, or itself."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep."""

    name: str
    """Name of the trial and of its run folder."""
    series: str
    labels: dict[str, str]
    """Labels that tell it from the others of its series, by column: `size`, `budget`, and every axis's key."""
    recipe: Path
    overrides: tuple[str, ...]
    """Changes to the recipe, as `key=value`."""
    config: RunConfig
    """Config of both, resolved and checked."""
    branch: Branch | None = None
    """Place where it branches off another trial; None begins at step 0."""
    choice: TrialChoice | None = None
    """Choice that it takes part in; None is trained always."""

    @cached_property
    def params(self) -> int:
        """Parameters, embeddings included."""
        return count_params(self.config.model)["total"]

    @property
    def is_candidate(self) -> bool:
        """Whether it is trained without waiting for a choice."""
        return self.choice is None or self.choice.twin == self.name

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return self.config.train.steps

    @property
    def tokens(self) -> int:
        """Training tokens in all."""
        return self.steps * self.config.train.global_batch_tokens

    @cached_property
    def flops(self) -> int:
        """Training FLOPs in all."""
        return round(self.tokens * flops_per_token(self.config.model, self.config.train.seq_len))

    @property
    def flops_spent(self) -> int:
        """Training FLOPs of its own: without those of the steps that it takes over."""
        return round(self.flops * (1 - (self.branch.step / self.steps if self.branch else 0)))
