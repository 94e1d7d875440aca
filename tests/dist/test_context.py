"""Ranks that share sequences train the model of one process, in whatever company, and send what the plan says."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from hopescale.config.layout import Layout
from hopescale.data.load_tokenizer import load_tokenizer
from hopescale.data.loader import Batch, Share
from hopescale.data.prepare import prepare
from hopescale.data.records import Document
from hopescale.data.train_tokenizer import train_tokenizer
from hopescale.engine.segments import Segments
from hopescale.models import Model
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.relay import Relay
from tests.support.kept_memory import parts_held
from tests.support.layouts import fork, saved, train_run, values, weights, worst
from tests.support.models import BASE
from tests.support.ranks import run_ranks
from tests.unit.engine.test_documents_in_pieces import MIXERS, PACKED
from tests.unit.engine.test_segments import BATCH

LONGER = ("train.seq_len=32", "train.global_batch_tokens=128", "train.validation.tokens=96")
TWO = {
    "cp2": ("parallel.cp=2",),
    "cp2, two segments, zero 1": ("parallel.cp=2", "train.segments=2", "parallel.zero=1"),
}
FOUR = {
    "cp2 x tp2, sequence parallel, two segments, memory recomputed": (
        *("parallel.cp=2", "parallel.tp=2", "parallel.sequence_parallel=true"),
        *("train.segments=2", "train.recompute=memory"),
    ),
    "cp2 x pp2, block recomputed": ("parallel.cp=2", "parallel.pp=2", "train.recompute=block"),
    "cp2 x dp2, zero 1": ("parallel.cp=2", "parallel.zero=1"),
}


def train_all(
    rank: int, num_ranks: int, folder: Path, layouts: dict[str, tuple[str, ...]], data: tuple[str, ...] = ()
) -> None:
    """Train each, and train the first again from the checkpoint in the middle."""
    for number, (name, settings) in enumerate(layouts.items()):
        train_run(folder / name, num_ranks, *LONGER, *data, *settings)
        if number:
            continue
        if rank == 0:
            fork(folder / name, folder / "parts", step=3)
        dist.barrier()
        train_run(folder / "parts", num_ranks, *LONGER, *data, *settings)
    if num_ranks == 4:
        mesh = Mesh.over_all(Layout(cp=4))
        for batch in (BATCH, PACKED):
            assert errors(mesh, "hope", 2, batch) < 1e-5


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of one process."""
    folder = tmp_path_factory.mktemp("single") / "run"
    train_run(folder, 1, *LONGER)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Return the settings of documents of 2 to 62 tokens in sequences of 32."""
    folder = tmp_path_factory.mktemp("texts")
    documents = [Document("\n".join(["level"] * (1 + n * 7 % 31)), f"made:{n}") for n in range(80)]
    train_tokenizer(documents, folder / "tokenizer", vocab_size=270)
    prepare(documents, load_tokenizer(folder / "tokenizer"), folder / "data", validation=0.2)
    source = ("data.sources.markov=null", f"data.sources.main={{path: {folder / 'data'}}}", "data.max_epochs=100")
    return (*source, "model.vocab_size=270", "model.within_documents=true")


TRIED = (
    *("hope", "resets and a far memory", "linear attention", "ttt", "mac", "mag", "mal", "mal without a window"),
    *("attention", "sliding window"),
)
DOCUMENTS = {
    "cp2 x tp2, sequence parallel, two segments": (
        *("parallel.cp=2", "parallel.tp=2", "parallel.sequence_parallel=true", "train.segments=2"),
    ),
    "cp2 x pp2": ("parallel.cp=2", "parallel.pp=2"),
}


def test_ranks_that_share_sequences_keep_documents_apart(texts: tuple[str, ...], tmp_path: Path):
    run_ranks(train_all, 4, tmp_path, 4, tmp_path, DOCUMENTS, texts, limit_s=600)
    train_run(tmp_path / "single", 1, *LONGER, *texts)
    compare(tmp_path, DOCUMENTS, tmp_path / "single", "main", texts)


@pytest.mark.parametrize("layouts", [TWO, FOUR], ids=["two ranks", "four ranks"])
def test_ranks_that_share_sequences_train_the_same_model(layouts: dict, single: Path, tmp_path: Path):
    num_ranks = 2 if layouts is TWO else 4
    run_ranks(train_all, num_ranks, tmp_path, num_ranks, tmp_path, layouts, limit_s=600)
    compare(tmp_path, layouts, single, "markov")


def compare(tmp_path: Path, layouts: dict, single: Path, source: str, data: tuple[str, ...] = ()) -> None:
    for name in layouts:
        for metric in ("loss", f"val/{source}/loss", "grad_norm"):
            assert values(tmp_path / name, metric) == pytest.approx(values(single, metric), rel=1e-5), (name, metric)
        error, parameter = worst(weights(tmp_path / name), weights(single))
        assert error <= 1e-5, f"{name}: {parameter} is off by {error:.1e}"
    first, parts = tmp_path / next(iter(layouts)), tmp_path / "parts"
    assert values(first) == values(parts), "resumed in mid-period"
    ended = saved(parts)
    assert all(torch.equal(tensor, ended[key]) for key, tensor in saved(first).items())
    fork(first, tmp_path / "one process", step=3)
    train_run(tmp_path / "one process", 1, *LONGER, *data)
    assert worst(weights(tmp_path / "one process"), weights(single))[0] <= 1e-5, "continued on another layout"


def errors(mesh: Mesh, mixer: str, count: int, batch: Batch = BATCH) -> float:
    """Return the largest relative error (of norms) of gradients, summed over the ranks that share the sequences."""
    config = replace(BASE, mixers={"mixer": MIXERS[mixer]}, within_documents=batch is PACKED)
    alone = Mesh.alone()
    whole, part, own = Model(config, seed=2, mesh=alone), Model(config, seed=2, mesh=mesh), Segments(mesh, count)
    Segments(alone, 1).run(whole, batch, None, None).backward()
    share = Share(mesh.cp_group.rank(), mesh.cp_group.size(), count)
    own.run(part, batch.share(share), None, None).backward()
    own.settle()
    largest = 0.0
    for parameter, expected in zip(part.parameters(), whole.parameters(), strict=True):
        dist.all_reduce(parameter.grad, group=mesh.dp_group)
        largest = max(largest, float((parameter.grad - expected.grad).norm() / expected.grad.norm()))
    return largest


def check_gradients(rank: int, cp: int) -> None:
    mesh, give = Mesh.over_all(Layout(cp=cp)), Relay.give
    for mixer in TRIED:
        assert errors(mesh, mixer, 1) < 1e-5, mixer
        assert errors(mesh, mixer, 2, PACKED) < 1e-5, f"{mixer} within documents"
    assert max(errors(mesh, mixer, 2) for mixer in ("two banks", "mal")) < 1e-5

    def lose(relay: Relay, tensors: list, step: int, tag: int, *, lost: int) -> None:
        give(relay, [torch.zeros_like(x) for x in tensors] if step == lost else tensors, step, tag)

    for lost, what in ((1, "states"), (-1, "gradients")):
        Relay.give = lambda *call, lost=lost: partial(lose, lost=lost)(*call)
        for batch in (BATCH, PACKED):
            assert errors(mesh, "hope", 1, batch) > 1e-3, f"lost {what} are not noticed"
    Relay.give = give
    parallel_state.destroy_model_parallel()
    for sequence_parallel in (False, True):
        mesh = Mesh.over_all(Layout(tp=2, sequence_parallel=sequence_parallel))
        for mixer in ("hope", "mac", "mal"):
            once, often = (documents_in_segments(mesh, mixer, count) for count in (1, 4))
            for name, gradient in once.items():
                assert float((often[name] - gradient).norm() / gradient.norm()) < 1e-5, (mixer, name)
        parallel_state.destroy_model_parallel()


def documents_in_segments(mesh: Mesh, mixer: str, count: int) -> dict[str, torch.Tensor]:
    """Return this rank's gradients."""
    config = replace(BASE, mixers={"mixer": MIXERS[mixer]}, within_documents=True)
    model = Model(config, seed=2, mesh=mesh)
    Segments(mesh, count).run(model, PACKED, None, None).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradients_of_every_mixer(tmp_path: Path):
    run_ranks(check_gradients, 2, tmp_path, 2, limit_s=400)


def test_ranks_that_share_sequences_hold_no_more_than_their_own_tokens_need(tmp_path: Path):
    """In a step also what a chunk needs, and states that come and go, which do not become less with the ranks."""
    found = parts_held(tmp_path, 64, (1,))
    for cp, most in ((2, 0.75), (4, 0.55)):
        kept, step = found[cp]
        assert kept == pytest.approx(1 / cp, rel=0.01) and step < most, found
