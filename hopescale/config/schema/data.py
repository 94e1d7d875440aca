"""What the model reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from hopescale.config.schema.ranges import Count, CountOrZero, NumberRange, Positive, Seed


@dataclass(frozen=True)
class SyntheticConfig:
    """A generated data set: needs no files and no tokenizer. Sample `i` is a pure function of (seed, split, i)."""

    task: Literal["copy", "recall", "markov"] = "markov"
    """`copy`: random symbols, a marker, the same symbols. `recall`: key-value pairs, then keys whose values must be
    named. `markov`: text of a random second-order chain, whose entropy is known."""
    num_symbols: Annotated[int, NumberRange("[2, inf)")] = 24
    """Symbols of the task; `model.vocab_size` must be at least this plus two markers. At most 128 for `markov`."""
    num_samples: Count = 100_000
    """Training sequences per epoch."""


@dataclass(frozen=True)
class SourceConfig:
    """One data set of the mixture: a folder written by `hopescale data prepare`, or a synthetic one."""

    path: str | None = None
    """Folder with `index.json`, relative to the working directory. Either this or `synthetic`."""
    synthetic: SyntheticConfig | None = None
    """Settings of a generated data set. Either this or `path`."""
    weight: Positive = 1.0
    """Share of the training sequences, relative to the other sources' weights; exact to within 1/4096 of the whole,
    which is also the smallest share."""


@dataclass(frozen=True)
class DataConfig:
    """The training mixture."""

    sources: dict[str, SourceConfig | None] = field(default_factory=dict)
    """Data sets by name; `null` removes one that a base recipe defines. Names appear in `val/<name>/loss`."""
    seed: Seed = 0
    """Seed of the sample order and of synthetic data; independent of the model's seed."""
    max_epochs: Count = 1
    """How often a source may be read at most, each time in another order; a run that needs more is refused before it
    starts."""
    staged: str | None = None
    """Folder on each node's own disk with copies of the data sets, made by `hopescale node stage` and read in place of
    `path`; null reads from `path`. Variables as in `$TMPDIR` are filled in on the node. A run may change it at any
    time: the data is the same."""
    prefetch: CountOrZero = 2
    """Batches prepared ahead in a background thread; 0 prepares them in the training loop. No effect on order."""
