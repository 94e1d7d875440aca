"""Sums over replicas are on their way before a backward pass returns, and change nothing."""

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
from hopescale.optim import OuterOptimizer, replicated
from tests.support.layouts import saved, train_run, values
from tests.support.ranks import run_ranks

MATRICES = "optim.groups.matrices={rule: m3, match: ['*_proj.weight','*.gate.weight','*.up.weight','*.down.weight']}"
WAYS = {
    "zero 0": ("parallel.zero=0",),
    "zero 1": ("parallel.zero=1",),
    "bf16": ("parallel.zero=1", "train.precision=bf16"),
    "matrices": ("parallel.zero=1", MATRICES),
}
SETTINGS = ("train.global_batch_tokens=128", "train.micro_batch_size=2")
"""Of two micro batches for each of two replicas."""


@contextmanager
def small_buckets() -> Iterator[None]:
    """Cut this tiny model as a large one is cut."""
    with patch.object(updates, "EVEN_ELEMENTS", 1), patch.object(replicated, "BUCKET_ELEMENTS", 4096):
        yield


@contextmanager
def all_at_the_end() -> Iterator[None]:
    """Begin no sum before the backward pass has returned."""
    with patch.object(OuterOptimizer, "expect", lambda *_: None):
        yield


@contextmanager
def in_order() -> Iterator[list[tuple[str, int]]]:
    """Write down, in order: bytes of sums that begin, gradients that come, and ends of backward passes."""
    found: list[tuple[str, int]] = []
    backward, arrive = OuterOptimizer.backward, Tensor.backward

    def noting(name: str, position: int) -> Any:
        original = getattr(dist, name)

        def noted(*tensors: Any, async_op: bool = False, **options: Any) -> Any:
            if async_op:
                found.append(("begin", tensors[position].nbytes))
            return original(*tensors, async_op=async_op, **options)

        return noted

    def noted_pass(loss: Tensor, *arguments: Any, **options: Any) -> None:
        arrive(loss, *arguments, **options)
        found.append(("returned", 0))

    def noted_backward(optimizer: OuterOptimizer, loss: Tensor, *, is_last: bool = False) -> None:
        found.append(("last" if is_last else "pass", 0))
        backward(optimizer, loss, is_last=is_last)

    collectives = {"all_reduce": 0, "reduce_scatter_tensor": 1}
    with (
        patch.multiple(dist, **{name: noting(name, position) for name, position in collectives.items()}),
        patch.object(OuterOptimizer, "backward", noted_backward),
        patch.object(Tensor, "backward", noted_pass),
    ):
        yield found


def train_both(rank: int, folder: Path, way: str) -> None:
    settings = (*SETTINGS, *WAYS[way])
    with small_buckets():
        with in_order() as found:
            train_run(folder / "early", 2, *settings)
        with all_at_the_end():
            train_run(folder / "late", 2, *settings)
    names = [name for name, _ in found]
    lasts = [place for place, name in enumerate(names) if name == "last"]
    assert len(lasts) == 6 and names.count("pass") == 6, "two micro batches a step"
    for first, end in zip(lasts, [*lasts[1:], len(names)], strict=True):
        step = found[first:end]
        returned = names[first:end].index("returned")
        early = sum(count for name, count in step[:returned] if name == "begin")
        late = sum(count for name, count in step[returned:] if name == "begin")
        assert early > 0 and early >= 0.9 * (early + late), f"{early} bytes begin early, {late} late"
        # One after the other, and not all at the end.
        assert [name for name, _ in step[:returned]].count("begin") >= 4
    assert "begin" not in names[: lasts[0]], "nothing is sent of a micro batch that is not the last"


@pytest.mark.parametrize("way", WAYS)
def test_sums_begin_before_the_backward_pass_returns_and_change_no_bit(way: str, tmp_path: Path):
    run_ranks(train_both, 2, tmp_path, tmp_path, way)
    early, late = tmp_path / "early", tmp_path / "late"
    assert values(early) == values(late)
    assert values(early, "grad_norm") == values(late, "grad_norm")
    ended = saved(late)
    assert all(torch.equal(tensor, ended[key]) for key, tensor in saved(early).items())
