"""Ranks that were killed go on from the memory of the nodes that are left, bit for bit."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
import torch

from hopescale.engine import Engine
from tests.support.layouts import train_run, weights
from tests.support.ranks import run_ranks

LAYOUTS = {
    2: (
        "parallel.zero=1",
        "checkpoint.every=3",
        "checkpoint.async_save=false",
        "model.cms.levels.mid={update_every_steps: 4, lag: 2}",
    ),
    4: ("parallel.tp=2", "checkpoint.every=100"),
}
"""Settings by number of ranks: the first have an older checkpoint on disk when they start again, the others none."""
KILLED = 6
"""Step at whose start ranks are killed; step 4 is the newest in memory, and a slow level has gathered since step 3.

What the level with a lag has sent at step 4 is for step 6.
"""


def overrides_of(num_ranks: int, folder: Path) -> tuple[str, ...]:
    memory = f"checkpoint.memory={{every: 2, folder: {folder / 'shm'}}}"
    return *LAYOUTS[num_ranks], memory, "train.validation.every=null"


def killed(rank: int, folder: Path, num_ranks: int) -> None:
    """Train to the end, and then the same run again until all ranks are killed."""
    socket.gethostname = lambda: f"node-{2 * rank // num_ranks}"
    own = overrides_of(num_ranks, folder)
    train_run(folder / "whole", num_ranks, *own, planned=False)
    assert not any((folder / "shm").iterdir()), "a run that ends leaves nothing in memory"
    gradients = Engine.gradients

    def until_killed(engine: Engine, step: int, *arguments, **options):
        if step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        return gradients(engine, step, *arguments, **options)

    Engine.gradients = until_killed
    train_run(folder / "run", num_ranks, *own, planned=False)


def restarted(rank: int, folder: Path, num_ranks: int) -> None:
    """Continue the run that was killed, from step 4."""
    socket.gethostname = lambda: f"node-{2 * rank // num_ranks}"
    gradients, steps = Engine.gradients, []

    def seen(engine: Engine, step: int, *arguments, **options):
        steps.append(step)
        return gradients(engine, step, *arguments, **options)

    Engine.gradients = seen
    try:
        train_run(folder / "run", num_ranks, *overrides_of(num_ranks, folder), planned=False)
    finally:
        Engine.gradients = gradients
    assert steps == [5, 6]


@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_a_lost_node_costs_the_steps_since_the_last_in_memory(num_ranks: int, tmp_path: Path):
    with pytest.raises(AssertionError, match="failed"):
        run_ranks(killed, num_ranks, tmp_path, tmp_path, num_ranks)
    assert (tmp_path / "run" / "checkpoints" / "latest").exists() == (num_ranks == 2)
    held = [path for path in (tmp_path / "shm").rglob("rank-*") if path.suffix != ".json"]
    assert len(held) == 2 * num_ranks
    for path in held:
        if int(path.name.rpartition("-")[2]) < num_ranks // 2:  # at the first node, which is lost
            path.unlink()
            path.with_name(f"{path.name}.json").unlink()
    run_ranks(restarted, num_ranks, tmp_path, tmp_path, num_ranks)
    whole, found = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert whole.keys() == found.keys()
    assert all(torch.equal(whole[name], found[name]) for name in whole)
