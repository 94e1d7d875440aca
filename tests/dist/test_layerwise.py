"""Matrices that are distributed over replicas are updated as one process would, whatever the rule and the cadence."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from hopescale.config.layout import Layout
from hopescale.config.load import load_recipe
from hopescale.config.schema import (
    DeepMomentumConfig,
    DeltaMomentumConfig,
    GroupConfig,
    M3Config,
    OptimConfig,
    ScheduleConfig,
)
from hopescale.engine.zero import ZeroAdamW
from hopescale.models import Model
from hopescale.optim import Cadence, OuterOptimizer
from hopescale.optim.layerwise import LayerwiseOptimizer
from hopescale.parallel.layers import ParameterSpec, attach
from hopescale.parallel.mesh import Mesh
from tests.support.layouts import fork, saved, train_run, values, weights, worst
from tests.support.ranks import run_ranks
from tests.support.traffic import Traffic

RULES = ("muon", "m3", "delta_momentum", "deep_momentum", "dgd")
STEPS, MICRO_BATCHES = 6, 4
SHAPES: dict[str, tuple[tuple[int, ...], int | None]] = {
    **{f"fast.{i}.up": ((8, 6), 0) for i in range(5)},
    **{f"fast.{i}.down": ((6, 8), 1) for i in range(3)},
    "mid.0.up": ((10, 6), 0),
    "mid.1.up": ((10, 6), 0),
    "slow.0.up": ((8, 6), 0),
    "slow.0.heads": ((4, 5, 5), 0),
    "slow.0.whole": ((5, 7), None),
    "fast.norm": ((7,), None),
    "slow.norm": ((3,), None),
    "embedding": ((12, 5), 0),
}
"""Whole shapes, and the dimension that tensor-parallel ranks split."""
CADENCES = {"mid": Cadence(2), "slow": Cadence(4, phase=1)}


def make_config(rule: str, tp_mode: str = "shard") -> OptimConfig:
    heads = () if rule == "dgd" else ("*.heads",)
    return OptimConfig(
        lr=0.05,
        eps=0.1,
        grad_clip=0.5,
        schedule=ScheduleConfig(warmup_steps=2),
        tp_mode=tp_mode,
        m3=M3Config(frequency=2, eps=0.1),
        delta_momentum=DeltaMomentumConfig(beta2=0.9, eps=0.1),
        deep_momentum=DeepMomentumConfig(memory_dim=4),
        groups={
            "still": GroupConfig(match=("*norm",), weight_decay=0.0, lr_scale=0.5),
            "tall": GroupConfig(match=("*.up",), rule=rule, lr_scale=0.5),
            "other": GroupConfig(match=("*.down", *heads, "*.whole"), rule=rule, weight_decay=0.0),
            "rest": GroupConfig(),
        },
    )


def draw(name: str, seed: int, mesh: Mesh) -> Tensor:
    """This rank's slice of what depends on name and seed alone."""
    shape, split = SHAPES[name]
    generator = torch.Generator().manual_seed(100 * seed + list(SHAPES).index(name))
    whole = torch.randn(shape, generator=generator)
    if split is None:
        return whole
    return whole.chunk(mesh.tp_group.size(), split)[mesh.tp_group.rank()].contiguous()


def draw_inputs(name: str, seed: int) -> Tensor:
    """Inputs of a layer over all ranks, `[tokens, C]`."""
    generator = torch.Generator().manual_seed(100 * seed + list(SHAPES).index(name) + 50)
    return torch.randn(9, SHAPES[name][0][-1], generator=generator)


class Run:
    """Parameters with an optimizer, fed with gradients of which each replica sees some."""

    def __init__(self, mesh: Mesh, config: OptimConfig, dtype: torch.dtype = torch.float32, **settings):
        self.mesh = mesh
        parameters = {
            name: attach(nn.Parameter(draw(name, 0, mesh).to(dtype)), ParameterSpec(partition_dim=split))
            for name, (_, split) in SHAPES.items()
        }
        cadences = {name: CADENCES[name.split(".")[0]] for name in SHAPES if name.split(".")[0] in CADENCES}
        self.optimizer = OuterOptimizer(parameters, config, STEPS, cadences, mesh=mesh, **settings)
        self.updaters = self.optimizer.updaters

    def step(self, step: int) -> float:
        group = self.mesh.dp_group
        for micro in range(group.rank(), MICRO_BATCHES, group.size()):
            for name, parameter in self.optimizer.parameters.items():
                parameter.backward((draw(name, 10 * step + micro, self.mesh) / 10).to(parameter.dtype))
                if hasattr(parameter, "gram"):
                    self.see(name, parameter, draw_inputs(name, 10 * step + micro))
        due = self.optimizer.due(step)
        self.optimizer.reduce(due)
        norm = self.optimizer.grad_norms({"due": due})["due"]
        before = self.optimizer.masters(due)
        self.optimizer.step(step, norm)
        return norm.item() + self.optimizer.change({"due": due}, {"due": before}).read()["due"]

    def see(self, name: str, parameter: nn.Parameter, inputs: Tensor) -> None:
        """Do what a hook on a layer does."""
        own, tp = inputs, self.mesh.tp_group
        if SHAPES[name][1] == 1:
            own = inputs.chunk(tp.size(), 1)[tp.rank()]
        rows = inputs if parameter.gram.shape[0] == inputs.shape[1] else own
        parameter.gram.add_(rows.T @ own)

    def whole(self) -> dict[str, Tensor]:
        """Weights, whole."""
        result = {}
        for name, parameter in self.optimizer.parameters.items():
            split, group = SHAPES[name][1], self.mesh.tp_group
            parts = [torch.empty_like(parameter) for _ in range(group.size())]
            dist.all_gather(parts, parameter.detach().contiguous(), group=group)
            result[name] = parts[0] if split is None else torch.cat(parts, split)
        return result


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, what: str) -> None:
    error, name = worst({n: t.float() for n, t in found.items()}, {n: t.float() for n, t in expected.items()})
    assert error <= tolerance, f"{what}: {name} is off by {error:.1e}"


def check_training(rank: int, tp: int) -> None:
    mesh, alone = Mesh.over_all(Layout(dp=dist.get_world_size() // tp, tp=tp)), Mesh.alone()
    for rule in RULES:
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
            config = make_config(rule, "gather" if tp > 1 else "shard")
            reference, run = Run(alone, config, dtype), Run(mesh, config, dtype)
            runs = [run]
            if tp == 1:
                runs.append(Run(mesh, config, dtype, updater=sharded_adamw))
            for step in range(1, STEPS + 1):
                expected = reference.step(step)
                for run in runs:
                    what = f"{rule}, {dtype}, step {step}, {type(run.updaters[0]).__name__}"
                    assert run.step(step) == pytest.approx(expected, rel=max(1e-5, tolerance)), what
                    assert_equal(run.whole(), reference.whole(), tolerance, what)


def sharded_adamw(*arguments, **settings) -> ZeroAdamW:
    return ZeroAdamW(*arguments, stage=1, **settings)


@pytest.mark.parametrize(("ranks", "tp"), [(2, 1), (4, 1), (2, 2), (4, 2)])
def test_shared_out_equals_one_process(ranks: int, tp: int, tmp_path: Path):
    run_ranks(check_training, ranks, tmp_path, tp)


def check_slices(rank: int) -> None:
    """With `shard` a slice is updated as a matrix of its own."""
    mesh, alone = Mesh.over_all(Layout(tp=2)), Mesh.alone()
    sharded, gathered = Run(mesh, make_config("muon")), Run(mesh, make_config("muon", "gather"))
    reference = Run(alone, make_config("muon"))
    for run in (sharded, gathered, reference):
        run.step(1)
    ours, whole = sharded.whole(), reference.whole()
    assert torch.allclose(ours["fast.0.up"], gathered.whole()["fast.0.up"], atol=1e-3) is False
    assert torch.equal(ours["fast.norm"], whole["fast.norm"])
    for name in ("mid.0.up", "mid.1.up"):
        assert torch.equal(ours[name], whole[name]), "not due"


def test_shard_updates_each_slice_by_itself(tmp_path: Path):
    run_ranks(check_slices, 2, tmp_path)


def check_traffic(rank: int) -> None:
    mesh = Mesh.over_all(Layout(dp=2))
    run = Run(mesh, make_config("muon"))
    _, layerwise = run.updaters
    with Traffic(mesh) as traffic:
        for step in range(1, STEPS + 1):
            for name, parameter in run.optimizer.parameters.items():
                parameter.backward(draw(name, step, mesh))
            due = [name for name in run.optimizer.due(step) if name in layerwise.parameters]
            waiting = {
                name: layerwise.accumulated_grad(name).clone() for name in layerwise.parameters if name not in due
            }
            expected = 0
            for cadence in {run.optimizer.cadences[name] for name in due}:
                sizes = {name: SIZES[name] for name in due if run.optimizer.cadences[name] == cadence}
                total, own = sum(sizes.values()), sum(sizes[n] for n in sizes if layerwise.ownership.is_here(n))
                part = -(-total // (8 * 2)) * 8
                # Gradients in equal parts and a part to its owners; weights from their owners and in equal parts.
                expected += 4 * (2 * part + min(part, total - rank * part) + own + part)
            traffic.bytes.clear()
            layerwise.reduce(due)
            layerwise.update(due, dict.fromkeys(due, 1.0), run.optimizer.rates(step))
            assert traffic.bytes.total() == expected, f"step {step}"
            assert all(torch.equal(layerwise.accumulated_grad(name), total) for name, total in waiting.items())
            traffic.bytes.clear()
            layerwise.reduce([])
            layerwise.update([], {}, run.optimizer.rates(step))
            assert traffic.bytes.total() == 0


SIZES = {name: torch.Size(shape).numel() for name, (shape, _) in SHAPES.items()}


def test_what_is_not_due_sends_nothing(tmp_path: Path):
    """Gradients go out once, in equal parts and then to their owners, and weights the other way."""
    run_ranks(check_traffic, 2, tmp_path)


def check_overlap(rank: int) -> None:
    """Weights leave while what is due apart is updated; small windows change no bit, as two summands have one order."""
    mesh, begun = Mesh.over_all(Layout(dp=2)), []
    events = {"gather": dist.all_gather_into_tensor, "update": LayerwiseOptimizer._update_classes}

    def noted(event: str) -> Callable:
        def call(*arguments, **options):
            begun.append(event)
            return events[event](*arguments, **options)

        return call

    for dtype in (torch.float32, torch.bfloat16):
        whole, parts = Run(mesh, make_config("m3"), dtype), Run(mesh, make_config("m3"), dtype)
        for step in range(1, STEPS + 1):
            measured = whole.step(step)
            with (
                patch("hopescale.optim.owner_exchange.WINDOW_ELEMENTS", 40),
                patch("hopescale.optim.layerwise.MATRIX_ELEMENTS", 1),
                patch.object(dist, "all_gather_into_tensor", noted("gather")),
                patch.object(LayerwiseOptimizer, "_update_classes", noted("update")),
            ):
                assert parts.step(step) == measured
            for run in (whole, parts):
                for name, parameter in run.optimizer.parameters.items():
                    assert torch.equal(parameter, whole.optimizer.parameters[name]), f"step {step}: {name}"
    order = "".join(event[0] for event in begun)
    assert order.count("g") >= STEPS and re.search("ugu", order), order
    layerwise = parts.updaters[1]
    assert all(each.flat._work is None for each in (*layerwise._sums, *layerwise._weights))


def test_weights_leave_while_others_are_updated(tmp_path: Path):
    run_ranks(check_overlap, 2, tmp_path)


LINEAR = "['*_proj.weight','*.gate.weight','*.up.weight','*.down.weight']"
MATRICES = "['*_proj.weight','*.gate.weight','*.up.weight','*.down.weight','*.banks.*']"


def check_bytes(rank: int) -> None:
    settings = ["model.num_layers=24", f"optim.groups.matrices={{rule: m3, match: {MATRICES}}}"]
    config = load_recipe("hope_tiny", settings).config
    held = {}
    for name, mesh in {"dp1": Mesh.alone(), "dp4": Mesh.over_all(Layout(dp=4))}.items():
        model = Model(config.model, seed=1, mesh=mesh).to_precision(torch.bfloat16)
        cadences = {
            parameter: Cadence(level.update_every_steps)
            for key, level in model.levels()
            for parameter in model.level_parameters()[key]
        }
        optimizer = OuterOptimizer(dict(model.named_parameters()), config.optim, 10, cadences, mesh=mesh)
        layerwise = optimizer.updaters[1]
        held[name] = sum(tensor.nbytes for tensor in layerwise.state_dict().values())
    share = held["dp4"] / held["dp1"]
    assert 0.20 <= share <= 0.30


def test_a_rank_of_four_holds_at_most_three_tenths_of_the_state(tmp_path: Path):
    run_ranks(check_bytes, 4, tmp_path)


def settings_of(rule: str, layout: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Of a run in which rounding stays small.

    Nothing small is divided by what is smaller, and three iterations of Muon enlarge the noise of directions without
    gradient 40-fold rather than five 480-fold. With the weights of seed 0 a gradient of a memory is nearly of lower
    rank, and Muon's rounding reaches 3e-5.
    """
    own = {
        "muon": ("optim.muon.ns_steps=3",),
        "m3": ("optim.m3.eps=0.1", "optim.m3.frequency=2"),
        "delta_momentum": ("optim.delta_momentum.delta=0.2",),
        "dgd": ("optim.groups.matrices.lr_scale=20",),
    }
    group = f"optim.groups.matrices={{rule: {rule}, match: {LINEAR if rule == 'dgd' else MATRICES}}}"
    return (*layout, group, "train.seed=1", *own.get(rule, ()))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a run of one process, trained at the first call for a rule."""

    @cache
    def run(rule: str) -> Path:
        folder = tmp_path_factory.mktemp("single") / "run"
        train_run(folder, 1, *settings_of(rule))
        return folder

    return run


def train_twice(rank: int, num_ranks: int, folder: Path, layout: tuple[str, ...], rules: tuple[str, ...]) -> None:
    for rule in rules:
        settings, whole, parts = settings_of(rule, layout), folder / rule, folder / f"{rule} in parts"
        train_run(whole, num_ranks, *settings)
        if rank == 0:
            fork(whole, parts, step=3)
        dist.barrier()
        train_run(parts, num_ranks, *settings)


LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "dp2": (2, ("parallel.dp=2",)),
    "dp2 zero 1": (2, ("parallel.zero=1",)),
    "tp2 x dp2": (4, ("parallel.tp=2", "optim.tp_mode=gather")),
    "pp2 x dp2": (4, ("parallel.pp=2",)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_train_the_same_model_and_resume_in_mid_period(single: Callable[..., Path], name: str, tmp_path: Path):
    num_ranks, layout = LAYOUTS[name]
    run_ranks(train_twice, num_ranks, tmp_path, num_ranks, tmp_path, layout, RULES, limit_s=360)
    for rule in RULES:
        run, parts = tmp_path / rule, tmp_path / f"{rule} in parts"
        error, parameter = worst(weights(run), weights(single(rule)))
        assert error <= 1e-6, f"{rule}: {parameter} is off by {error:.1e}"
        assert values(run) == values(parts), f"{rule}, resumed in mid-period"
        ended = saved(parts)
        assert all(torch.equal(tensor, ended[key]) for key, tensor in saved(run).items()), rule


def train_bf16(rank: int, folder: Path) -> None:
    train_twice(rank, 4, folder, ("parallel.tp=2", "optim.tp_mode=gather", "train.precision=bf16"), ("m3",))


def test_gathered_masters_of_bf16_weights_resume_exactly(tmp_path: Path):
    run_ranks(train_bf16, 4, tmp_path, tmp_path)
    whole, parts = saved(tmp_path / "m3"), saved(tmp_path / "m3 in parts")
    assert whole.keys() == parts.keys() and "optimizer.blocks.0.cms.levels.fast.up.weight.master" in whole
    assert all(torch.equal(tensor, parts[key]) for key, tensor in whole.items())
    fork(tmp_path / "m3", tmp_path / "one", step=3)
    train_run(tmp_path / "one", 1, *settings_of("m3"), "train.precision=bf16")
    error, parameter = worst(weights(tmp_path / "one"), weights(tmp_path / "m3"))
    assert error <= 2e-2, f"{parameter} is off by {error:.1e}"


def continue_on(rank: int, folder: Path, layouts: dict[str, tuple[str, ...]]) -> None:
    for rule in RULES:
        for name, layout in layouts.items():
            if rank == 0:
                fork(folder / rule, folder / f"{rule} {name}", step=3)
            dist.barrier()
            train_run(folder / f"{rule} {name}", 4, *settings_of(rule, layout))


def test_a_checkpoint_of_two_replicas_continues_on_any_layout(tmp_path: Path):
    """In mid-period, with states that two replicas hold between them."""
    run_ranks(train_twice, 2, tmp_path, 2, tmp_path, ("parallel.dp=2",), RULES)
    layouts = {"dp4": ("parallel.dp=4",), "tp2 x pp2": ("parallel.tp=2", "parallel.pp=2", "optim.tp_mode=gather")}
    run_ranks(continue_on, 4, tmp_path, tmp_path, layouts)
    for rule in RULES:
        fork(tmp_path / rule, tmp_path / f"{rule} one", step=3)
        train_run(tmp_path / f"{rule} one", 1, *settings_of(rule))
        for name in ("one", *layouts):
            error, parameter = worst(weights(tmp_path / f"{rule} {name}"), weights(tmp_path / rule))
            assert error <= 1e-6, f"{rule}, {name}: {parameter} is off by {error:.1e}"
