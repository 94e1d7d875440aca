"""Updates sharded over replicas equal those of one process that reads all data, whatever the stage and the cadence."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from hopescale.config.layout import Layout
from hopescale.config.schema import AttentionConfig, GroupConfig, ModelConfig, OptimConfig, ScheduleConfig
from hopescale.engine.zero import ZeroAdamW
from hopescale.models import Model
from hopescale.optim import Cadence, OuterOptimizer
from hopescale.optim.replicated import ReplicatedAdamW
from hopescale.parallel.layers import ParameterSpec, attach, cross_entropy_sum
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.regions import reduce_from_ranks, share_with_ranks
from tests.support.models import BASE
from tests.support.ranks import run_ranks

STEPS, HORIZON, MICRO_BATCHES = 8, 12, 2
GROUPS = {"no_decay": GroupConfig(match=("*norm",), weight_decay=0.0, lr_scale=0.5), "decay": GroupConfig()}
CONFIG = OptimConfig(
    lr=0.05, eps=0.1, weight_decay=0.1, groups=GROUPS, grad_clip=0.5, schedule=ScheduleConfig(warmup_steps=2)
)
CADENCES = {"middle": Cadence(2), "slow": Cadence(4, phase=1), "bias": Cadence(4, phase=1)}


def draw(seed: int, *shape: int, mesh: Mesh, dtype: torch.dtype, split: bool = False) -> nn.Parameter:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.4
    if split:
        value = value.chunk(mesh.tp_group.size())[mesh.tp_group.rank()].clone()
    spec = ParameterSpec(partition_dim=0 if split else None, keep_fp32=dtype == torch.float32)
    return attach(nn.Parameter(value.to(dtype)), spec)


class Table(nn.Module):
    def __init__(self, mesh: Mesh, dtype: torch.dtype):
        super().__init__()
        self.weight = draw(1, 11, 5, mesh=mesh, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.weight)


class Layer(nn.Module):
    """Levels, what stays float32, what is split over tensor-parallel ranks; sizes that replicas do not divide."""

    def __init__(self, seed: int, mesh: Mesh, dtype: torch.dtype):
        super().__init__()
        new = partial(draw, mesh=mesh, dtype=dtype)
        self.mesh, self.norm = mesh, draw(seed, 5, mesh=mesh, dtype=torch.float32)
        self.fast, self.middle, self.slow = new(seed + 1, 7, 5), new(seed + 2, 5, 7), new(seed + 3, 5, 5)
        self.bias = draw(seed + 4, 1, mesh=mesh, dtype=torch.float32)
        self.inner = nn.ParameterDict({"split": new(seed + 5, 6, 5, split=True)})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(F.linear(x, self.fast)) @ self.middle.t() + x
        x = F.linear(x, self.slow) * (1 + self.bias.to(x.dtype))
        x = (x.float() * self.norm).to(x.dtype)
        part = F.linear(share_with_ranks(x, self.mesh), self.inner["split"]).float().square().sum()
        return x, reduce_from_ranks(part, self.mesh)


class Net(nn.Module):
    """Layers between the two ends of a tied embedding, which are gathered apart from them; returns a loss."""

    def __init__(self, mesh: Mesh, dtype: torch.dtype):
        super().__init__()
        self.table = Table(mesh, dtype)
        self.blocks = nn.ModuleList([Layer(10, mesh, dtype), Layer(20, mesh, dtype)])
        self.norm = draw(2, 5, mesh=mesh, dtype=torch.float32)

    def forward(self, tokens: Tensor) -> Tensor:
        x, loss = self.table(tokens), 0.0
        for block in self.blocks:
            x, more = block(x)
            loss = loss + more
        x = (x.float() * self.norm).to(x.dtype)
        return F.linear(x, self.table.weight).float().logsumexp(-1).sum() + loss


class Run:
    """A net with its optimizer, that takes steps."""

    def __init__(self, mesh: Mesh, stage: int, dtype: torch.dtype = torch.float32):
        self.mesh, self.net, self.stage = mesh, Net(mesh, dtype), stage
        updater = ReplicatedAdamW
        if stage:
            updater = partial(ZeroAdamW, stage=stage, model=self.net, whole=(Layer,))
        parameters = dict(self.net.named_parameters())
        cadences = {name: CADENCES[name.split(".")[-1]] for name in parameters if name.split(".")[-1] in CADENCES}
        self.optimizer = OuterOptimizer(parameters, CONFIG, HORIZON, cadences, mesh=mesh, updater=updater)
        (self.updater,) = self.optimizer.updaters

    def step(self, step: int) -> list[float]:
        for micro in range(MICRO_BATCHES):
            self.optimizer.backward(self.net(self.tokens(step, micro)) / 72)
        due = self.optimizer.due(step)
        waiting = [name for name in self.optimizer.parameters if name not in due]
        self.optimizer.reduce(due)
        norms = self.optimizer.grad_norms({"due": due, "waiting": waiting, "fast": ["blocks.1.fast"]})
        assert norms["waiting"].isfinite()
        before = self.optimizer.masters(due)
        self.optimizer.step(step, norms["due"])
        change = self.optimizer.change({"due": due}, {"due": before}).read()
        return [norms["due"].item(), norms["fast"].item(), change["due"]]

    def tokens(self, step: int, micro: int) -> Tensor:
        generator = torch.Generator().manual_seed(100 * step + micro)
        tokens = torch.randint(0, 11, (12, 3), generator=generator)
        return tokens.chunk(self.mesh.dp_group.size())[self.mesh.dp_group.rank()]

    def weights(self) -> dict[str, Tensor]:
        """Whole over replicas, on each of them."""
        held = {name: tensor.clone() for name, tensor in self.updater.weights().items()}
        if self.stage < 3:
            return held
        parts: list = [None] * self.mesh.dp_group.size()
        dist.all_gather_object(parts, held, group=self.mesh.dp_group)
        return {name: tensor for part in parts for name, tensor in part.items()}


def assert_equal(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, mesh: Mesh, what: str
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if found[name].shape != value.shape:
            value = value.chunk(mesh.tp_group.size())[mesh.tp_group.rank()]
        assert found[name].dtype == value.dtype
        error = float((found[name].float() - value.float()).norm() / value.float().norm())
        assert error <= tolerance, f"{what}: {name} is off by {error:.1e}"


def check_training(rank: int, tp: int, stages: list[int]) -> None:
    mesh = Mesh.over_all(Layout(dp=dist.get_world_size() // tp, tp=tp))
    alone = Mesh.alone()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        reference, replicated = Run(alone, 0, dtype), Run(mesh, 0, dtype)
        runs = {stage: Run(mesh, stage, dtype) for stage in stages}
        for step in range(1, STEPS + 1):
            before = {stage: run.weights() for stage, run in runs.items()}
            expected, same = reference.step(step), replicated.step(step)
            due = reference.optimizer.due(step)
            for stage, run in runs.items():
                what = f"stage {stage}, {dtype}, step {step}"
                measured = run.step(step)
                torch.testing.assert_close(measured, same, rtol=1e-5, atol=0, msg=lambda m, w=what: f"{w}: {m}")
                torch.testing.assert_close(measured, expected, rtol=max(1e-5, tolerance), atol=0)
                if stage == 3:
                    assert not any(parameter.numel() for parameter in run.net.parameters()), f"{what}: weights stay"
                after = run.weights()
                assert_equal(after, reference.weights(), tolerance, mesh, what)
                assert_equal(after, replicated.weights(), 1e-6, mesh, what)
                for name, value in after.items():
                    same_as_before = torch.equal(value, before[stage][name])
                    # A small update may be lost in rounding.
                    assert same_as_before == (name not in due) or dtype == torch.bfloat16, f"{what}: {name}"
                    assert same_as_before or name in due, f"{what}: {name}"
                with torch.no_grad():
                    torch.testing.assert_close(run.net(run.tokens(0, 0)), replicated.net(run.tokens(0, 0)))


@pytest.mark.parametrize(("ranks", "tp"), [(2, 1), (3, 1), (4, 2)])
def test_stages_equal_one_process(ranks: int, tp: int, tmp_path: Path):
    run_ranks(check_training, ranks, tmp_path, tp, [1, 2, 3])


def count_sent() -> Counter[str]:
    """Count, from now on, the bytes this rank hands to collectives that carry gradients or weights."""
    sent: Counter[str] = Counter()

    def counting(name: str):
        original = getattr(dist, name)

        def counted(*arguments, **options):
            tensors = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
            sent[name] += tensors[-1].nbytes if tensors[-1].numel() > 4 else 0
            return original(*arguments, **options)

        return counted

    for name in ("reduce", "all_reduce", "broadcast", "reduce_scatter_tensor", "all_gather_into_tensor"):
        setattr(dist, name, counting(name))
    return sent


def check_traffic(rank: int) -> None:
    mesh, sent = Mesh.over_all(Layout(dp=2)), count_sent()
    run = Run(mesh, 1)
    for step in range(1, STEPS + 1):
        sent.clear()
        run.step(step)
        entries = sum(run.optimizer.parameters[name].numel() for name in run.optimizer.due(step))
        # Each gradient goes out once, and of each weight the half that is here; shards are filled up to equal sizes.
        assert sent.keys() <= {"reduce_scatter_tensor", "all_gather_into_tensor", "all_reduce"}
        assert sent["all_reduce"] == 0
        assert 4 * entries <= sent["reduce_scatter_tensor"] <= 4 * entries + 4 * 64, f"step {step}"
        assert 2 * entries <= sent["all_gather_into_tensor"] <= 2 * entries + 64, f"step {step}"


def test_a_level_that_is_not_due_sends_nothing_at_stage_1(tmp_path: Path):
    run_ranks(check_traffic, 2, tmp_path)


def merged(parts: dict[str, Tensor], mesh: Mesh, *, add: bool = False) -> dict[str, Tensor]:
    """What a checkpoint makes of what each replica returns."""
    everyone: list = [None] * mesh.dp_group.size()
    dist.all_gather_object(everyone, {name: tensor.clone() for name, tensor in parts.items()}, group=mesh.dp_group)
    whole: dict[str, Tensor] = {}
    for part in everyone:
        whole |= {name: whole[name] + tensor if add and name in whole else tensor for name, tensor in part.items()}
    return whole


def check_restoring(rank: int, dtype: torch.dtype) -> None:
    mesh, alone = Mesh.over_all(Layout(dp=2)), Mesh.alone()
    # In the middle of the periods of both slow levels, which have both been updated before.
    saved_at, continued = 5, {}
    sources = {stage: Run(mesh, stage, dtype) for stage in (0, 1, 2, 3)}
    for stage, source in sources.items():
        for step in range(1, saved_at + 1):
            source.step(step)
        held = source.updater.state_dict()
        if stage > 0:
            first, second = owned(held, mesh)
            assert first and second and first.isdisjoint(second)
        weights, state = merged(source.updater.weights(), mesh), merged(held, mesh)
        sums = merged(source.updater.sums(), mesh, add=True)
        continued[stage] = [(other, Run(where, other, dtype)) for other in (0, 1, 2, 3) for where in (mesh, alone)]
        for _, target in continued[stage]:
            own_weights = {name: weights[name] for name in target.updater.weights()}
            target.updater.load(own_weights, {name: state[name] for name in target.updater.state_dict()})
            target.updater.load_sums(sums if target.mesh.dp_group.rank() == 0 else {})
    for step in range(saved_at + 1, STEPS + 1):
        for source in sources.values():
            source.step(step)
        for stage, targets in continued.items():
            for other, target in targets:
                target.step(step)
                what = f"stage {stage} to {other} on {target.mesh.dp_group.size()}, step {step}"
                exact = target.mesh is mesh
                tolerance = 1e-6 if exact or dtype == torch.float32 else 2e-2
                assert_equal(target.weights(), sources[stage].weights(), tolerance, mesh, what)


def owned(state: dict[str, Tensor], mesh: Mesh) -> list[set[str]]:
    everyone: list = [None] * mesh.dp_group.size()
    dist.all_gather_object(everyone, set(state), group=mesh.dp_group)
    return everyone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_stage_continues_from_any_other(dtype: torch.dtype, tmp_path: Path):
    run_ranks(check_restoring, 2, tmp_path, dtype)


def check_model(rank: int, changes: dict) -> None:
    mesh = Mesh.over_all(Layout(dp=2))
    # Sums in another order change a weight by its last bit, which is a large one in bfloat16.
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        check_model_of(replace(BASE, **changes), dtype, tolerance, mesh)


def check_model_of(config: ModelConfig, dtype: torch.dtype, tolerance: float, mesh: Mesh) -> None:
    runs = {}
    for stage in (0, 1, 3):
        model = Model(config, seed=2, mesh=mesh, recompute="block").to_precision(dtype)
        cadences = {name: Cadence(2) for name in model.level_parameters()["slow"]}
        updater = partial(ZeroAdamW, stage=stage, model=model) if stage else ReplicatedAdamW
        parameters, rule = dict(model.named_parameters()), OptimConfig(lr=0.01, eps=1e-3)
        runs[stage] = model, OuterOptimizer(parameters, rule, HORIZON, cadences, mesh=mesh, updater=updater)
    for step in range(1, 5):
        generator = torch.Generator().manual_seed(10 * step + mesh.dp_group.rank())
        tokens = torch.randint(0, 200, (2, 2, 13), generator=generator)
        measured = {}
        for stage, (model, optimizer) in runs.items():
            for micro in tokens:
                logits, _ = model(micro[:, :-1])
                optimizer.backward(cross_entropy_sum(logits, micro[:, 1:], mesh) / 96)
            due = optimizer.due(step)
            optimizer.reduce(due)
            norm = optimizer.grad_norms({"due": due})["due"]
            optimizer.step(step, norm)
            with torch.no_grad():
                first, state = model(tokens[0], last_only=True)
                second, _ = model(tokens[1, :, :1], state)
            measured[stage] = [norm, first[..., :200].float(), second[..., :200].float()]
        for stage in (1, 3):
            torch.testing.assert_close(measured[stage], measured[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("changes", [{}, {"mixers": {"attention": AttentionConfig()}}, {"tie_embeddings": False}])
def test_the_model_trains_evaluates_and_continues_texts_at_stages_1_and_3(changes: dict, tmp_path: Path):
    run_ranks(check_model, 2, tmp_path, changes)
