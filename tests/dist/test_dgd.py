"""Delta gradient descent where ranks share layers: which Gram matrix a slice has, what is sent, what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hopescale.config.layout import Layout
from hopescale.config.schema import GroupConfig, OptimConfig
from hopescale.optim import Cadence, OuterOptimizer
from hopescale.optim.gram import gather_grams, linear_layers
from hopescale.parallel.layers import ColumnLinear, RowLinear
from hopescale.parallel.mesh import Mesh
from tests.support.layouts import fork, saved, train_run, values, weights, worst
from tests.support.ranks import run_ranks
from tests.support.traffic import Traffic

TOKENS, SEQUENCES, WIDTH, HIDDEN = 6, 2, 6, 8
COLUMNS = "['*.in_proj.weight','*.gate.weight','*.up.weight']"
ALL = "['*_proj.weight','*.gate.weight','*.up.weight','*.down.weight']"


class Layers(nn.Module):
    """One layer of either kind, `slow` and `fast`."""

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.up = nn.ModuleDict({key: ColumnLinear(WIDTH, HIDDEN, std=1.0, mesh=mesh) for key in ("slow", "fast")})
        self.down = nn.ModuleDict({key: RowLinear(HIDDEN, WIDTH, std=1.0, mesh=mesh) for key in ("slow", "fast")})
        for number, parameter in enumerate(self.parameters()):
            whole = torch.randn(HIDDEN * WIDTH, generator=torch.Generator().manual_seed(number))
            split = parameter.spec.partition_dim
            whole = whole.view((HIDDEN, WIDTH) if split == 0 else (WIDTH, HIDDEN))
            parameter.data = whole.chunk(mesh.tp_group.size(), split)[mesh.tp_group.rank()].contiguous()

    def forward(self, x: Tensor) -> Tensor:
        for key in ("slow", "fast"):
            x = x + self.down[key](torch.tanh(self.up[key](x)))
        return x


def after_backward(mesh: Mesh, tp_mode: str) -> tuple[Layers, OuterOptimizer]:
    """Layers after a backward pass over two sequences, of which a replica sees some and a rank maybe some tokens."""
    layers = Layers(mesh)
    parameters = dict(layers.named_parameters())
    config = OptimConfig(lr=0.5, grad_clip=None, groups={"all": GroupConfig(rule="dgd")}, tp_mode=tp_mode)
    cadences = {name: Cadence(2) for name in parameters if ".slow." in name}
    optimizer = OuterOptimizer(parameters, config, 4, cadences, mesh=mesh)
    whole = tp_mode == "gather"
    gather_grams(linear_layers(layers), parameters, TOKENS * SEQUENCES, whole_matrices=whole, mesh=mesh)
    x = torch.randn(TOKENS, SEQUENCES, WIDTH, generator=torch.Generator().manual_seed(9))
    x = x.chunk(mesh.dp_group.size(), 1)[mesh.dp_group.rank()]
    if mesh.sequence_parallel:
        x = x.chunk(mesh.tp_group.size())[mesh.tp_group.rank()]
    layers(x.contiguous()).square().sum().backward()
    return layers, optimizer


def check_grams(rank: int, layout: Layout) -> None:
    alone, mesh, tp = after_backward(Mesh.alone(), "shard")[0], Mesh.over_all(layout), layout.tp
    expected = {name: parameter.gram for name, parameter in alone.named_parameters()}
    for tp_mode in ("shard", "gather") if tp > 1 else ("shard",):
        layers, optimizer = after_backward(mesh, tp_mode)
        for name, parameter in layers.named_parameters():
            total = parameter.gram.clone()
            dist.all_reduce(total, group=mesh.dp_group)
            whole, rank_of = expected[name], mesh.tp_group.rank()
            if parameter.spec.partition_dim == 1:
                whole = whole.chunk(tp, 1)[rank_of]
                whole = whole if tp_mode == "gather" else whole.chunk(tp)[rank_of]
            torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6)
        check_sums(optimizer, tp_mode)
        check_sending(mesh, optimizer)


def check_sums(optimizer: OuterOptimizer, tp_mode: str) -> None:
    """What is saved of a slow level has all rows, zeros where nothing is known, and comes back as it was."""
    sums, tp = optimizer.sums(), optimizer.mesh.tp_group
    assert {name for name in sums if name.endswith(".gram")} == {"up.slow.weight.gram", "down.slow.weight.gram"}
    gram, columns = optimizer.parameters["down.slow.weight"].gram, sums["down.slow.weight.gram"]
    assert columns.shape == (HIDDEN, HIDDEN // tp.size())
    rows = columns if tp_mode == "gather" else columns.chunk(tp.size())[tp.rank()]
    assert torch.equal(rows, gram) and columns.count_nonzero() == gram.count_nonzero()
    kept, before = {name: total.clone() for name, total in sums.items()}, gram.clone()
    optimizer.load_sums({})
    assert not gram.any() and not optimizer.accumulated_grad("up.slow.weight").any()
    optimizer.load_sums(kept)
    assert torch.equal(gram, before)
    assert torch.equal(optimizer.parameters["up.slow.weight"].gram, kept["up.slow.weight.gram"])


def check_sending(mesh: Mesh, optimizer: OuterOptimizer) -> None:
    """A step without the slow level sends nothing of it; with it gradients and Gram matrices go out once."""
    (updater,), replicas = optimizer.updaters, mesh.dp_group.size()
    for step in (1, 2):
        due, before = optimizer.due(step), optimizer.parameters["up.slow.weight"].gram.clone()
        sent = 0
        for level in ("fast", "slow") if replicas > 1 else ():
            names = [name for name in due if f".{level}." in name]
            weights = {name: optimizer.parameters[name].numel() for name in names}
            sums = {name: weights[name] + optimizer.parameters[name].gram.numel() for name in names}
            part, of_weights = (-(-sum(each.values()) // (8 * replicas)) * 8 for each in (sums, weights))
            filled = min(part, max(0, sum(sums.values()) - mesh.dp_group.rank() * part))
            own = sum(weights[name] for name in names if updater.ownership.is_here(name))
            # Sums in equal parts and a part to its owners; weights from their owners and in equal parts.
            sent += 4 * (replicas * part + filled + own + of_weights)
        with Traffic(mesh) as traffic:
            optimizer.reduce(due)
            optimizer.step(step, torch.ones(()))
        assert traffic.bytes["dp"] == sent, f"step {step}"
        assert not any(optimizer.parameters[name].gram.any() for name in due)
        assert step == 2 or torch.equal(optimizer.parameters["up.slow.weight"].gram, before)


LAYOUTS = {
    "dp2": (2, Layout(dp=2)),
    "tp2": (2, Layout(tp=2)),
    "tp2 sequence parallel": (2, Layout(tp=2, sequence_parallel=True)),
    "tp2 x dp2": (4, Layout(dp=2, tp=2)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_slice_has_the_gram_matrix_of_its_inputs_over_all_tokens(name: str, tmp_path: Path):
    ranks, layout = LAYOUTS[name]
    run_ranks(check_grams, ranks, tmp_path, layout)


def settings(match: str, *others: str) -> tuple[str, ...]:
    return (f"optim.groups.matrices={{rule: dgd, lr_scale: 20, match: {match}}}", *others)


def train_sliced(rank: int, folder: Path) -> None:
    """Slices of rows; then slices of columns too, also in two parts, the first of them maybe of one process."""
    split = ("parallel.tp=2", "optim.tp_mode=shard")
    for name, others in {
        "tp2": (),
        "sequence parallel": ("parallel.sequence_parallel=true",),
        "again": ("train.recompute=block", "parallel.sequence_parallel=true", "model.cms.variant=independent"),
    }.items():
        train_run(folder / name, 2, *settings(COLUMNS, *split, *others))
    train_run(folder / "all", 2, *settings(ALL, *split))
    if rank == 0:
        fork(folder / "all", folder / "all in parts", step=3)
        fork(folder / "alone", folder / "alone on two", step=3)
    dist.barrier()
    train_run(folder / "all in parts", 2, *settings(ALL, *split))
    train_run(folder / "alone on two", 2, *settings(ALL, *split))


def test_slices_of_rows_equal_one_process_and_slices_of_columns_resume(tmp_path: Path):
    train_run(tmp_path / "one", 1, *settings(COLUMNS))
    train_run(tmp_path / "one independent", 1, *settings(COLUMNS, "model.cms.variant=independent"))
    train_run(tmp_path / "alone", 1, *settings(ALL))
    run_ranks(train_sliced, 2, tmp_path, tmp_path)
    for name in ("tp2", "sequence parallel", "again"):
        reference = "one independent" if name == "again" else "one"
        error, parameter = worst(weights(tmp_path / name), weights(tmp_path / reference))
        assert error <= 1e-6, f"{name}: {parameter} is off by {error:.1e}"
    whole, parts = saved(tmp_path / "all"), saved(tmp_path / "all in parts")
    assert values(tmp_path / "all") == values(tmp_path / "all in parts")
    assert all(torch.equal(tensor, parts[key]) for key, tensor in whole.items())
    saved_gram = "optimizer.blocks.0.cms.levels.mid.down.weight.gram.accumulator.0"
    blocks, full = saved(tmp_path / "all", 3)[saved_gram], saved(tmp_path / "alone", 3)[saved_gram]
    half = len(full) // 2
    mask = torch.block_diag(torch.ones(half, half), torch.ones(half, half))
    assert full.any() and torch.equal(blocks != 0, (full != 0) & mask.bool())
    fork(tmp_path / "all", tmp_path / "all on one", step=3)
    train_run(tmp_path / "all on one", 1, *settings(ALL))
    apart, _ = worst(weights(tmp_path / "all"), weights(tmp_path / "alone"))
    for name in ("all on one", "alone on two"):
        error, parameter = worst(weights(tmp_path / name), weights(tmp_path / "alone"))
        assert 0 < error < apart, f"{name}, half of the way alone: {parameter} is off by {error:.1e}"
