"""Examples of a suite as rows for training. Sample `i` is a pure function of (data seed, split, i)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hopescale.config.schema import SuiteConfig
from hopescale.data.samples import IGNORED, Rows
from hopescale.suites.registry import Generated, Split, num_ids
from hopescale.suites.task import NOT_ASKED


class SuiteSamples:
    """One split of a suite's task. A row is one example, filled up behind it, and one document."""

    def __init__(self, config: SuiteConfig, *, seed: int, split: Split, seq_len: int, examples: int | None = None):
        """Choose a task; `hopescale.suites.registry.problems` must have found none.

        Args:
            config: Task and its settings.
            seed: Seed of the parts that all examples share, such as the words of a language.
            split: Name of the split.
            seq_len: Tokens of a row.
            examples: Seed of the examples; None is `seed`.
        """
        self.num_samples = config.num_samples
        self._config, self._split, self._seq_len = config, split, seq_len
        self._seed = seed if examples is None else examples
        self._generated = Generated(config, seed=seed, length=config.length or seq_len)

    def read(self, samples: Sequence[int]) -> Rows:
        """Generate samples."""
        shape = (len(samples), self._seq_len)
        tokens = np.full(shape, num_ids(self._config) - 1, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        examples = self._generated.examples(self._split, samples, seed=self._seed)
        for row, (read, answers) in enumerate(examples):
            tokens[row, : len(read)] = read
            targets[row, : len(read)] = np.where(answers == NOT_ASKED, IGNORED, answers)
        return Rows(tokens, targets, np.zeros(shape, np.int32))

    def describe(self, sample: int) -> str:
        """Name the task and the sample."""
        return f"suite {self._config.task}, {self._split} sample {sample} of seed {self._seed}"
