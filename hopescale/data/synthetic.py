"""Generated tasks with a known best loss. Sample `i` is a pure function of (data seed, split, i)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from hopescale.config.schema import SyntheticConfig
from hopescale.data.samples import IGNORED, Rows

MAX_MARKOV_SYMBOLS = 128
"""The table of a second-order chain has the cube of this many entries."""

Split = Literal["train", "validation"]

_STREAMS = {"train": 0, "validation": 1, "table": 2}
_MARKOV_CONCENTRATION = 0.1  # of the Dirichlet prior; few likely successors per pair
_MIN_SEQ_LEN = {"copy": 2, "recall": 4, "markov": 2}


def problems(config: SyntheticConfig, *, seq_len: int, vocab_size: int) -> list[tuple[str, str]]:
    """Check a task against the model's sizes: pairs of a field's name and what is wrong with it."""
    faults = []
    if config.task == "markov" and config.num_symbols > MAX_MARKOV_SYMBOLS:
        faults.append(("num_symbols", f"{config.num_symbols} is too many for markov; at most {MAX_MARKOV_SYMBOLS}"))
    if config.num_symbols + 2 > vocab_size:
        need = f"{config.num_symbols} symbols and 2 markers need a vocabulary of {config.num_symbols + 2}"
        faults.append(("num_symbols", f"{need}, but model.vocab_size is {vocab_size}"))
    shortest = _MIN_SEQ_LEN[config.task]
    if seq_len < shortest:
        faults.append(("task", f"{config.task} needs train.seq_len of at least {shortest}, got {seq_len}"))
    return faults


class SyntheticSamples:
    """One split of a generated data set. Ids: symbols `0..num_symbols-1`, then the marker, then the end.

    - `copy`: `T // 2` random symbols, the marker, the same symbols. Targets count on the second half only.
    - `recall`: pairs of a distinct key and a random value, the marker, then keys in random order, each followed by its
      value. Keys are of the lower half of the symbols, values of the upper half. Targets count where the input is a
      key after the marker.
    - `markov`: a second-order chain that starts with two uniform symbols. Targets count from the third symbol on;
      `entropy` is the mean loss of a model that knows the chain.

    Every other target is `IGNORED`. What does not fill the row is the end symbol. A row is one document.
    """

    def __init__(self, config: SyntheticConfig, *, seed: int, split: Split, seq_len: int):
        """Choose a task; `problems` must have found none."""
        self.num_samples = config.num_samples
        self._config = config
        self._seed = seed
        self._split = split
        self._seq_len = seq_len
        self._table = _markov_table(config.num_symbols, seed).cumsum(-1) if config.task == "markov" else None

    def read(self, samples: Sequence[int]) -> Rows:
        """Generate samples."""
        generators = [_generator(self._seed, _STREAMS[self._split], sample) for sample in samples]
        if self._config.task == "markov":
            tokens, counted = self._markov(generators)
        else:
            one = self._copy if self._config.task == "copy" else self._recall
            rows = [one(generator) for generator in generators]
            tokens, counted = np.stack([row for row, _ in rows]), rows[0][1]
        targets = np.where(counted, tokens[:, 1:], IGNORED)
        return Rows(tokens[:, :-1], targets, np.zeros(targets.shape, np.int32))

    def describe(self, sample: int) -> str:
        """Name the task and the sample."""
        return f"synthetic {self._config.task}, {self._split} sample {sample} of seed {self._seed}"

    def _blank(self) -> tuple[np.ndarray, np.ndarray]:
        """Give a row of `T + 1` end symbols and a mask of `T` targets, none counted."""
        return np.full(self._seq_len + 1, self._config.num_symbols + 1), np.zeros(self._seq_len, bool)

    def _copy(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        row, counted = self._blank()
        half = self._seq_len // 2
        symbols = generator.integers(self._config.num_symbols, size=half)
        row[: 2 * half + 1] = [*symbols, self._config.num_symbols, *symbols]
        counted[half : 2 * half] = True
        return row, counted

    def _recall(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        row, counted = self._blank()
        num_keys = self._config.num_symbols // 2
        num_pairs = min(num_keys, self._seq_len // 4)
        num_queries = (self._seq_len - 2 * num_pairs) // 2
        keys = generator.permutation(num_keys)[:num_pairs]
        values = generator.integers(num_keys, self._config.num_symbols, size=num_pairs)
        rounds = -(-num_queries // num_pairs)
        order = np.concatenate([generator.permutation(num_pairs) for _ in range(rounds)])[:num_queries]
        queries = slice(2 * num_pairs + 1, 2 * (num_pairs + num_queries) + 1)
        row[: 2 * num_pairs] = np.stack([keys, values], axis=1).ravel()
        row[2 * num_pairs] = self._config.num_symbols
        row[queries] = np.stack([keys[order], values[order]], axis=1).ravel()
        counted[queries.start : queries.stop : 2] = True
        return row, counted

    def _markov(self, generators: list[np.random.Generator]) -> tuple[np.ndarray, np.ndarray]:
        size = self._config.num_symbols
        draws = np.stack([generator.random(self._seq_len + 1) for generator in generators])  # [B, T + 1]
        rows = np.minimum((draws * size).astype(np.int64), size - 1)
        for t in range(2, rows.shape[1]):
            chances = self._table[rows[:, t - 2], rows[:, t - 1], :-1]  # [B, size - 1]
            rows[:, t] = (chances <= draws[:, t, None]).sum(-1)
        return rows, np.arange(self._seq_len) > 0


def entropy(config: SyntheticConfig, *, seed: int, seq_len: int) -> float:
    """Give the smallest mean loss that any model can expect, in nats per counted target.

    `copy` and `recall` are certain: 0. For `markov` the mean over the positions of the conditional entropy under the
    distribution of pairs at each position.
    """
    if config.task != "markov":
        return 0.0
    table = _markov_table(config.num_symbols, seed)
    logs = np.log(table, out=np.zeros_like(table), where=table > 0)
    conditional = -(table * logs).sum(-1)  # [S, S]
    pairs = np.full(conditional.shape, 1 / conditional.size)
    total = 0.0
    for _ in range(seq_len - 1):
        total += float((pairs * conditional).sum())
        pairs = np.einsum("ab,abc->bc", pairs, table)
    return total / (seq_len - 1)


def _markov_table(num_symbols: int, seed: int) -> np.ndarray:
    """Draw the chance of each symbol after each pair. Shape `[S, S, S]`, float64, rows sum to 1."""
    concentration = np.full(num_symbols, _MARKOV_CONCENTRATION)
    return _generator(seed, _STREAMS["table"]).dirichlet(concentration, size=(num_symbols, num_symbols))


def _generator(seed: int, *stream: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=stream)))
