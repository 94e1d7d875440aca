"""Sums over replicas are on their way before a backward pass returns, weights while the next forward pass runs, and
neither changes anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hopescale.cost import updates
from hopescale.engine import step
from hopescale.models import Model
from hopescale.optim import OuterOptimizer, replicated
from tests.support.layouts import saved, train_run, values
from tests.support.ranks import run_ranks

MATRICES = "optim.groups.matrices={rule: m3, match: ['*_proj.weight','*.gate.weight','*.up.weight','*.down.weight']}"
WAYS = {
    "zero 0": ("parallel.zero=0",),
    "zero 1": ("parallel.zero=1", "train.precision=bf16"),
    "matrices": ("parallel.zero=1", MATRICES),
}
SETTINGS = ("train.global_batch_tokens=128", "train.micro_batch_size=2")
"""Of two micro batches for each of two replicas."""
STEPS = 4
"""At which each level is due once at least."""


@contextmanager
def small_buckets() -> Iterator[None]:
    """Cut this tiny model as a large one is cut."""
    with patch.object(updates, "EVEN_ELEMENTS", 1), patch.object(replicated, "sum_elements", lambda whole: 4096):
        yield


@contextmanager
def all_at_the_end() -> Iterator[None]:
    """Begin no sum before the backward pass has returned, and wait for all weights in the update."""
    nothing = dict.fromkeys(("expect", "defer"), lambda *_: None)
    with patch.multiple(OuterOptimizer, **nothing):
        yield


class Lazy:
    """An exchange that is there when somebody waits for it, and not before."""

    def __init__(self, work: dist.Work, output: Tensor, arrived: Tensor):
        self._work, self._output, self._arrived = work, output, arrived

    def wait(self) -> None:
        self._work.wait()
        self._output.copy_(self._arrived)


@contextmanager
def seen_when_waited_for() -> Iterator[None]:
    """Let exchanges in the background change nothing before they are waited for: who reads earlier reads what was."""

    def lazily(name: str) -> Any:
        original = getattr(dist, name)

        def exchange(output: Tensor, *inputs: Tensor, async_op: bool = False, **options: Any) -> Any:
            if not async_op:
                return original(output, *inputs, async_op=async_op, **options)
            arrived = output.clone()
            return Lazy(original(arrived, *inputs, async_op=True, **options), output, arrived)

        return exchange

    names = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor")
    with patch.multiple(dist, **{name: lazily(name) for name in names}):
        yield


@contextmanager
def in_order() -> Iterator[list[tuple[str, int]]]:
    """Write down, in order: bytes of sums that begin, forward passes, when the number of targets is waited for,
    backward passes, their ends, and weights that come later.
    """
    found: list[tuple[str, int]] = []
    forward, wait = Model.forward, step._MeanOverTargets.wait

    def noted_forward(model: Model, *arguments: Any, **options: Any) -> Any:
        found.append(("forward", 0))
        return forward(model, *arguments, **options)

    def noted_wait(mean: step._MeanOverTargets) -> None:
        if mean._work is not None:
            found.append(("count", 0))
        wait(mean)

    backward, run, update = OuterOptimizer.backward, Tensor.backward, OuterOptimizer.step

    def noting(name: str, position: int) -> Any:
        original = getattr(dist, name)

        def noted(*tensors: Any, async_op: bool = False, **options: Any) -> Any:
            if async_op and tensors[position].ndim:  # a number is that of the targets
                found.append(("begin", tensors[position].nbytes))
            return original(*tensors, async_op=async_op, **options)

        return noted

    def noted_pass(loss: Tensor, *arguments: Any, **options: Any) -> None:
        run(loss, *arguments, **options)
        found.append(("returned", 0))

    def noted_update(optimizer: OuterOptimizer, *arguments: Any) -> None:
        update(optimizer, *arguments)
        found.append(("late", sum(len(getattr(each, "_on_their_way", ())) for each in optimizer.updaters)))

    def noted_backward(optimizer: OuterOptimizer, loss: Tensor, *, is_last: bool = False) -> None:
        found.append(("last" if is_last else "pass", 0))
        backward(optimizer, loss, is_last=is_last)

    collectives = {"all_reduce": 0, "reduce_scatter_tensor": 1}
    with (
        patch.multiple(dist, **{name: noting(name, position) for name, position in collectives.items()}),
        patch.multiple(OuterOptimizer, backward=noted_backward, step=noted_update),
        patch.object(Tensor, "backward", noted_pass),
        patch.object(Model, "forward", noted_forward),
        patch.object(step._MeanOverTargets, "wait", noted_wait),
    ):
        yield found


def train_both(rank: int, folder: Path, way: str) -> None:
    settings = (*SETTINGS, *WAYS[way])
    with small_buckets():
        with seen_when_waited_for(), in_order() as found:
            train_run(folder / "early", 2, *settings, last_step=STEPS)
        with all_at_the_end():
            train_run(folder / "late", 2, *settings, last_step=STEPS)
    names = [name for name, _ in found]
    counts = [place for place, name in enumerate(names) if name == "count"]
    assert len(counts) == STEPS and all(names[place - 1] == "forward" for place in counts), "weights come before it"
    lasts = [place for place, name in enumerate(names) if name == "last"]
    assert len(lasts) == STEPS and names.count("pass") == STEPS, "two micro batches a step"
    for first, end in zip(lasts, [*lasts[1:], len(names)], strict=True):
        own = found[first:end]
        returned = names[first:end].index("returned")
        early = sum(count for name, count in own[:returned] if name == "begin")
        late = sum(count for name, count in own[returned:] if name == "begin")
        assert early > 0 and early >= 0.9 * (early + late), f"{early} bytes begin early, {late} late"
        # One after the other, and not all at the end.
        assert [name for name, _ in own[:returned]].count("begin") >= 4
    weights = [count for name, count in found if name == "late"]
    assert len(weights) == STEPS
    assert (min(weights) >= 4) == (way != "zero 0"), "weights are on their way when an update returns"
    assert "begin" not in names[: lasts[0]], "nothing is sent of a micro batch that is not the last"


@pytest.mark.parametrize("way", WAYS)
def test_exchanges_run_beside_passes_and_change_no_bit(way: str, tmp_path: Path):
    run_ranks(train_both, 2, tmp_path, tmp_path, way)
    early, late = tmp_path / "early", tmp_path / "late"
    assert values(early) == values(late)
    assert values(early, "grad_norm") == values(late, "grad_norm")
    ended = saved(late, STEPS)
    assert all(torch.equal(tensor, ended[key]) for key, tensor in saved(early, STEPS).items())


def train_in_parts(rank: int, folder: Path) -> None:
    with patch.object(replicated, "sum_elements", lambda whole: 64):
        train_run(folder, 2, "parallel.cp=2", "parallel.zero=0", last_step=1)


def test_no_bucket_waits_for_another_rank_in_the_backward_pass_of_a_shared_sequence(tmp_path: Path):
    """More buckets of a block than may be under way at once: the rank before would wait for this one's block."""
    run_ranks(train_in_parts, 2, tmp_path, tmp_path / "run")
    train_run(tmp_path / "single", 1, last_step=1)
    assert values(tmp_path / "run") == pytest.approx(values(tmp_path / "single"), rel=1e-5)
