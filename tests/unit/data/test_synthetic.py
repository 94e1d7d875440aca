from __future__ import annotations

import numpy as np
import pytest

from hopescale.config.schema import SyntheticConfig
from hopescale.data.samples import IGNORED
from hopescale.data.synthetic import SyntheticSamples, entropy, problems

TASKS = ("copy", "recall", "markov")


def make(task: str, *, seq_len: int = 32, num_symbols: int = 8, seed: int = 0, split: str = "train"):
    config = SyntheticConfig(task=task, num_symbols=num_symbols, num_samples=1000)
    return SyntheticSamples(config, seed=seed, split=split, seq_len=seq_len)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seq_len", [4, 5, 31, 32, 200])
def test_shapes_ids_and_targets_one_later(task: str, seq_len: int) -> None:
    rows = make(task, seq_len=seq_len).read(range(6))
    assert rows.tokens.shape == rows.targets.shape == rows.document_ids.shape == (6, seq_len)
    assert (rows.tokens.dtype, rows.targets.dtype, rows.document_ids.dtype) == (np.int64, np.int64, np.int32)
    assert rows.tokens.min() >= 0 and rows.tokens.max() < 8 + 2
    counted = rows.targets != IGNORED
    assert counted.any(axis=1).all()
    following = np.roll(rows.tokens, -1, axis=1)
    np.testing.assert_array_equal(rows.targets[:, :-1][counted[:, :-1]], following[:, :-1][counted[:, :-1]])
    assert rows.targets[counted].max() < 8


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_is_a_function_of_seed_split_and_number(task: str) -> None:
    tokens = make(task).read(range(50)).tokens
    np.testing.assert_array_equal(make(task).read([31, 7]).tokens, tokens[[31, 7]])
    assert len({row.tobytes() for row in tokens}) == 50
    others = make(task, seed=1).read(range(50)).tokens, make(task, split="validation").read(range(50)).tokens
    for other in others:
        assert {row.tobytes() for row in other}.isdisjoint(row.tobytes() for row in tokens)


def test_copy_repeats_what_came_before_the_marker() -> None:
    rows = make("copy", seq_len=33).read(range(20))
    for tokens, targets in zip(rows.tokens, rows.targets, strict=True):
        assert tokens[16] == 8 and tokens[:16].max() < 8
        np.testing.assert_array_equal(targets[16:32], tokens[:16])
        assert (targets[:16] == IGNORED).all() and targets[32] == IGNORED


def test_recall_asks_for_values_that_were_given() -> None:
    rows = make("recall", seq_len=41).read(range(20))
    for tokens, targets in zip(rows.tokens, rows.targets, strict=True):
        given = dict(zip(tokens[:8:2], tokens[1:8:2], strict=True))
        assert len(given) == 4 and max(given) < 4 <= min(given.values())
        assert tokens[8] == 8
        places = np.flatnonzero(targets != IGNORED)
        np.testing.assert_array_equal(places, range(9, 41, 2))
        assert [given[key] for key in tokens[places]] == targets[places].tolist()
        assert {*tokens[places[:4]]} == given.keys()


def test_markov_loss_of_the_true_chain_is_its_entropy() -> None:
    config = SyntheticConfig(task="markov", num_symbols=6, num_samples=1)
    rows = SyntheticSamples(config, seed=3, split="train", seq_len=40).read(range(3000))
    full = np.concatenate([rows.tokens, rows.targets[:, -1:]], axis=1)
    counts = np.zeros((6, 6, 6))
    np.add.at(counts, (full[:, :-2].ravel(), full[:, 1:-1].ravel(), full[:, 2:].ravel()), 1)
    chances = counts / counts.sum(-1, keepdims=True).clip(1)
    empirical = -(counts * np.log(chances, where=chances > 0, out=np.zeros_like(chances))).sum() / counts.sum()
    expected = entropy(config, seed=3, seq_len=40)
    assert abs(empirical - expected) < 0.02
    assert 0.2 < expected < np.log(6) - 0.3
    assert (rows.targets[:, 0] == IGNORED).all() and (rows.targets[:, 1:] != IGNORED).all()


def test_certain_tasks_have_no_entropy() -> None:
    assert [entropy(SyntheticConfig(task=task), seed=0, seq_len=64) for task in ("copy", "recall")] == [0, 0]


def test_both_splits_of_markov_follow_one_chain() -> None:
    train, held_out = make("markov"), make("markov", split="validation")
    seen = [
        {tuple(row[t : t + 3]) for row in samples.read(range(400)).tokens for t in range(30)}
        for samples in (train, held_out)
    ]
    assert len(seen[0] & seen[1]) > 0.7 * len(seen[1])


@pytest.mark.parametrize(
    ("task", "num_symbols", "seq_len", "vocab_size", "expected"),
    [
        ("markov", 24, 64, 26, []),
        ("copy", 24, 64, 25, ["num_symbols"]),
        ("markov", 200, 64, 500, ["num_symbols"]),
        ("recall", 24, 3, 20, ["num_symbols", "task"]),
    ],
)
def test_impossible_sizes_are_named(task, num_symbols, seq_len, vocab_size, expected) -> None:
    config = SyntheticConfig(task=task, num_symbols=num_symbols)
    assert [field for field, _ in problems(config, seq_len=seq_len, vocab_size=vocab_size)] == expected
