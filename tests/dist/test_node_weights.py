"""Blocks whose weights replicas of a node share out train as one process does, and are whole only while they run."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from hopescale.engine.node_weights import NodeWeights
from hopescale.models.init import initial_values
from hopescale.parallel.node_flat import NodeFlat
from tests.dist.test_layerwise import settings_of
from tests.support.layouts import fork, saved, train_run, values, weights, worst
from tests.support.ranks import run_ranks

NODES = ("parallel.shard=node", "parallel.ranks_per_node=2", "parallel.shard_weights=true")
SMALL = ("model.num_layers=3", "model.d_model=16", "train.global_batch_tokens=128", "checkpoint.async_save=false")
"""Of two micro batches for each of four replicas."""
CASES = {
    "adamw": ("train.recompute=none", "train.validation={every: 4, tokens: 48}"),
    "m3": (*settings_of("m3"), "train.recompute=block", "train.validation.every=null"),
}
LAST = 4


class Watched(NodeWeights):
    """Notes how many blocks are whole at a time."""

    most = 0

    def _gather(self, number: int, following: int) -> None:
        super()._gather(number, following)
        Watched.most = max(Watched.most, self.num_whole())
        assert all(flat.has_memory for flat in self._flats[number])
        if 0 <= following <= self._last:
            assert all(flat._work is not None for flat in self._flats[following]), "on its way under this block"

    def num_whole(self) -> int:
        return sum(any(flat.has_memory for flat in flats) for flats in self._flats)

    def _end_backward(self) -> None:
        assert self.num_whole() == 0, "each block is done when all its gradients are there"
        super()._end_backward()


class Listed(NodeFlat):
    """Notes how many flat tensors lie around whole while entries are drawn for another one, and counts these."""

    made: list[NodeFlat] = []
    most = draws = 0

    def __init__(self, *args: object):
        super().__init__(*args)
        Listed.made.append(self)


def draw(*args: object) -> torch.Tensor:
    Listed.draws += len(args[-1])
    Listed.most = max(Listed.most, sum(flat.has_memory for flat in Listed.made))
    return initial_values(*args)


def train(rank: int, folder: Path, *settings: str) -> None:
    """Train on two nodes of two, go on from the checkpoint in mid-period, and from one that one process has saved."""
    with (
        patch("hopescale.engine.node_weights.NodeWeights", Watched),
        patch("hopescale.engine.node_weights.initial_values", draw),
        patch("hopescale.engine.zero_even.NodeFlat", Listed),
        patch("hopescale.optim.owned_flat.NodeFlat", Listed),
    ):
        train_run(folder / "run", 4, *NODES, *SMALL, *settings, last_step=LAST)
        assert Watched.most == 2
        drawn = Listed.draws
        assert drawn > 0 and Listed.most == 0, "a start holds the weights of no other block"
        if rank == 0:
            fork(folder / "run", folder / "again", step=3)
            fork(folder / "single", folder / "moved", step=3)
        dist.barrier()
        for name in ("again", "moved"):
            train_run(folder / name, 4, *NODES, *SMALL, *settings, last_step=LAST)
        assert Listed.draws == drawn, "a run that continues draws nothing"


@pytest.mark.parametrize("case", CASES)
def test_two_nodes_of_two_equal_one_process(case: str, tmp_path: Path):
    """Bytes inside a node are held to the plan at every step."""
    settings = CASES[case]
    run, again, moved, single, one = (tmp_path / name for name in ("run", "again", "moved", "single", "one"))
    train_run(single, 1, *SMALL, *settings, last_step=LAST)
    run_ranks(train, 4, tmp_path, tmp_path, *settings)
    assert values(run) == values(again), "resumed in mid-period"
    ended = saved(again, LAST)
    assert all(torch.equal(tensor, ended[key]) for key, tensor in saved(run, LAST).items())
    fork(run, one, step=3)
    train_run(one, 1, *SMALL, *settings, last_step=LAST)
    for other in (run, moved, one):
        assert values(other) == pytest.approx(values(single), rel=1e-6), other.name
        for loss in ("val/markov/loss",) if case == "adamw" else ():
            assert values(other, loss)[LAST] == pytest.approx(values(single, loss)[LAST], rel=1e-6)
        error, parameter = worst(weights(other, LAST), weights(single, LAST))
        assert error <= (1e-6 if case == "adamw" else 1e-5), f"{other.name}: {parameter} is off by {error:.1e}"
