"""Replicas that sum inside their nodes first train as one process does, with every rule, and send between nodes what is
due."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from hopescale.common.errors import DivergedError
from hopescale.config.layout import Layout
from hopescale.parallel.mesh import Mesh
from hopescale.train import state
from hopescale.train.replicas import check_replicas
from tests.dist.test_layerwise import RULES, SHAPES, STEPS, Run, assert_equal, make_config, settings_of, sharded_adamw
from tests.support.layouts import fork, saved, train_run, values, weights, worst
from tests.support.ranks import run_ranks

NODES = ("parallel.shard=node", "parallel.ranks_per_node=2")
SETTINGS = settings_of("m3", ("train.global_batch_tokens=128",))
"""Of two micro batches for each of four replicas."""


PARTS = tuple([name for name in SHAPES if name.split(".")[1:2] == [part]] for part in ("0", "1"))
"""Names as of two blocks; others lie outside, some of which are alike."""


@contextmanager
def whole_weights(run: Run) -> Iterator[None]:
    """Let weights that are shared out be whole for a while."""
    flats = [flat for _, flat in run.optimizer.node_flats()]
    assert not any(flat.has_memory for flat in flats)
    for flat in flats:
        flat.begin_to_gather()
        flat.wait()
    yield
    for flat in flats:
        flat.free()


def check_rules(rank: int) -> None:
    """Each rule beside AdamW, with levels of three periods; half of the steps hold what waits, the others do not.

    Weights are whole, or those of blocks are shared out inside a node. Every second rule runs as if the ranks of a node
    shared sequences: sums then wait for the end of a step.
    """
    mesh, alone = Mesh.over_all(Layout(dp=4, node_replicas=2)), Mesh.alone()
    assert mesh.tiers.has_nodes and mesh.node_group.size() == mesh.nodes_group.size() == 2
    pieces = replace(mesh, cp_group=mesh.node_group)
    for rule in RULES:
        on = pieces if rule in RULES[::2] else mesh
        for dtype, tolerance, shared in (
            (torch.float32, 1e-6, ()),
            (torch.bfloat16, 2e-2, ()),
            (torch.float32, 1e-6, PARTS),
        ):
            config = make_config(rule)
            reference = Run(alone, config, dtype)
            run = Run(on, config, dtype, updater=sharded_adamw, shared=shared)
            for step in range(1, STEPS + 1):
                what = f"{rule}, {dtype}, step {step}{', weights shared out' if shared else ''}"
                assert run.step(step) == pytest.approx(reference.step(step), rel=max(1e-5, tolerance)), what
                with whole_weights(run):
                    assert_equal(run.whole(), reference.whole(), tolerance, what)
                waiting = [name for name in run.optimizer.parameters if name not in run.optimizer.due(step)]
                if step % 2 or step == STEPS:
                    run.optimizer.hold(waiting)
            held = {name: total.clone() for name, total in run.optimizer.sums().items()}
            run.optimizer.load_sums(held)
            again = run.optimizer.sums()
            assert held.keys() == again.keys() and any(total.any() for total in held.values())
            assert all(torch.equal(total, again[name]) for name, total in held.items()), f"{rule}: sums"
            whole = {name: total.clone() for name, total in held.items()}
            for total in whole.values():
                dist.all_reduce(total)
            assert_equal(whole, reference.optimizer.sums(), tolerance, f"{rule}, {dtype}: sums")
    check_comparison(run, rank)


def check_comparison(run: Run, rank: int) -> None:
    """What the ranks of one place keep of shared weights is compared between nodes."""
    whole, shares = run.optimizer.copies()
    check_replicas(whole, run.mesh, STEPS, shares)
    name = sorted(shares)[0]
    if rank == 2:
        shares[name][0] += 1
    with pytest.raises(DivergedError, match=f"after step {STEPS} the replicas hold different weights: {name}"):
        check_replicas(whole, run.mesh, STEPS, shares)


def test_every_rule_equals_one_process(tmp_path: Path):
    run_ranks(check_rules, 4, tmp_path)


def check_waiting(rank: int) -> None:
    """What is not finite is seen when it is held, not when it is due, whatever lies beside it in the flat tensor."""
    mesh = Mesh.over_all(Layout(dp=4, node_replicas=2))
    for rule in ("muon", "dgd"):
        run = Run(mesh, make_config(rule), updater=sharded_adamw)
        run.step(1)
        waiting = [name for name in run.optimizer.parameters if name not in run.optimizer.due(1)]
        run.optimizer.hold(waiting)
        assert run.optimizer.grad_norms({"waiting": waiting})["waiting"].isfinite(), rule
        if rank == 3:
            run.optimizer.accumulated_grad("slow.0.up")[-1, -1] = float("nan")
        run.optimizer.hold(waiting)
        assert run.optimizer.grad_norms({"waiting": waiting})["waiting"].isnan(), rule


def test_a_bad_gradient_that_waits_is_seen_when_it_is_held(tmp_path: Path):
    run_ranks(check_waiting, 4, tmp_path)


def train_twice(rank: int, folder: Path) -> None:
    """Train on two nodes of two ranks, then from the checkpoint in mid-period."""
    settings = (*NODES, *SETTINGS)
    train_run(folder / "run", 4, *settings)
    if rank == 0:
        fork(folder / "run", folder / "again", step=3)
    dist.barrier()
    train_run(folder / "again", 4, *settings)


def test_two_nodes_of_two_train_the_same_model_and_resume_in_mid_period(tmp_path: Path):
    """Bytes inside a node and between nodes are held to the plan at every step; one process goes on as well."""
    run_ranks(train_twice, 4, tmp_path, tmp_path)
    run, again, one = (tmp_path / name for name in ("run", "again", "one"))
    assert values(run) == values(again), "resumed in mid-period"
    ended = saved(again)
    assert all(torch.equal(tensor, ended[key]) for key, tensor in saved(run).items())
    fork(run, one, step=3)
    train_run(one, 1, *SETTINGS)
    train_run(tmp_path / "single", 1, *SETTINGS)
    for other in (one, tmp_path / "single"):
        assert values(run) == pytest.approx(values(other), rel=1e-5)
        error, parameter = worst(weights(run), weights(other))
        assert error <= 1e-5, f"{other.name}: {parameter} is off by {error:.1e}"
    inside, between = (values(run, f"comm/{axis}/bytes_per_step") for axis in ("node", "dp"))
    # At step 4 the middle level is due, at step 3 the slow one, at step 1 neither.
    assert inside[1] > between[1] and min(between[3], between[4]) > 1.2 * between[1]


SMALL = ("model.num_layers=1", "model.d_model=16", "train.validation.every=null", "parallel.timeout_s=100")
"""Of step 3, where runs are saved, the sums of the middle level wait for step 4."""


def train_summed(rank: int, folder: Path) -> None:
    """Train as nodes of two do that are more replicas than have sums of their own in a checkpoint."""
    with patch.object(state, "MAX_SUMS", 2):
        train_run(folder / "run", 4, *NODES, *SETTINGS, *SMALL, last_step=4)
        if rank == 0:
            fork(folder / "run", folder / "again", step=3)
        dist.barrier()
        train_run(folder / "again", 4, *NODES, *SETTINGS, *SMALL, last_step=4)


def test_sums_that_are_saved_as_one_go_on_in_any_layout(tmp_path: Path):
    run_ranks(train_summed, 4, tmp_path, tmp_path)
    run, again, one, single = (tmp_path / name for name in ("run", "again", "one", "single"))
    assert {key.rpartition(".")[2] for key in saved(run, 3) if ".accumulator." in key} == {"0"}
    assert values(run) == values(again), "resumed in mid-period"
    fork(run, one, step=3)
    for folder in (one, single):
        train_run(folder, 1, *SETTINGS, *SMALL, last_step=4)
        assert values(run) == pytest.approx(values(folder), rel=1e-5)
        error, parameter = worst(weights(run, 4), weights(folder, 4))
        assert error <= 1e-5, f"{folder.name}: {parameter} is off by {error:.1e}"
