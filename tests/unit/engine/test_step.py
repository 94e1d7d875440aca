"""One step of a tiny model against a plain computation of loss and gradient."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hopescale.config.schema import LevelConfig, ModelConfig, OptimConfig, ScheduleConfig, SelfModifyingConfig
from hopescale.config.schema.model import CmsConfig
from hopescale.data.loader import Batch
from hopescale.engine import Computed, Engine, make_passes
from hopescale.models import Model, level_of
from hopescale.observe.health import LossWatch
from hopescale.optim import Cadence, OuterOptimizer

VOCAB, SEQ_LEN, ROWS = 32, 16, 4
LEVELS = {
    "fast": LevelConfig(d_ff=8),
    "mid": LevelConfig(d_ff=8, update_every_steps=2),
    "slow": LevelConfig(d_ff=8, update_every_steps=4, phase=1),
}


def make_engine(dtype: torch.dtype = torch.float32, **optim) -> Engine:
    config = ModelConfig(
        vocab_size=VOCAB,
        d_model=16,
        num_layers=1,
        num_heads=2,
        mixers={"hope": SelfModifyingConfig(chunk_size=8)},
        cms=CmsConfig(levels=LEVELS),
    )
    model = Model(config).to_precision(dtype)
    levels: dict[str, list[str]] = {name: [] for name, _ in model.levels()}
    cadences = {}
    for name, _ in model.named_parameters():
        if (level := level_of(name)) is not None:
            levels[level].append(name)
            cadences[name] = Cadence(LEVELS[level].update_every_steps, LEVELS[level].phase)
    settings = OptimConfig(**{"lr": 0.01, "schedule": ScheduleConfig(min_lr_ratio=1.0)} | optim)
    optimizer = OuterOptimizer(dict(model.named_parameters()), settings, 100, cadences)
    device = torch.device("cpu")
    passes = make_passes([model], optimizer.backward, SEQ_LEN, device)
    return Engine(passes, optimizer, levels, device)


def make_batch(seed: int = 0) -> Batch:
    """Rows of which the first has no target at all, the second one, the others many."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(VOCAB, (2, ROWS, SEQ_LEN), generator=generator)
    targets[0] = -100
    targets[1, 1:] = -100
    targets[2, ::3] = -100
    return Batch(tokens, targets, torch.zeros(ROWS, SEQ_LEN, dtype=torch.int32))


def split(batch: Batch, size: int) -> list[Batch]:
    return [Batch(*parts) for parts in zip(*(part.split(size) for part in batch[:3]), strict=True)]


def plain(engine: Engine, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean loss over the targets that count, and its gradients, without the engine."""
    logits, _ = engine.passes.model(batch.tokens)
    counted = batch.targets != -100
    loss = -F.log_softmax(logits.float(), -1)[counted].gather(-1, batch.targets[counted][:, None]).mean()
    parameters = dict(engine.passes.model.named_parameters())
    return loss.detach(), dict(zip(parameters, torch.autograd.grad(loss, parameters.values()), strict=True))


def gathered(engine: Engine) -> dict[str, Tensor]:
    return {name: engine.optimizer.accumulated_grad(name) for name in engine.optimizer.parameters}


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_loss_and_gradients_are_those_of_one_batch(rows: int):
    engine, batch = make_engine(), make_batch()
    loss, expected = plain(engine, batch)
    found = engine.gradients(1, split(batch, rows)).read()
    assert found.loss == pytest.approx(loss.item(), rel=1e-6)
    for name, gradient in gathered(engine).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_a_fresh_model_knows_nothing():
    assert make_engine().gradients(1, [make_batch()]).read().loss == pytest.approx(math.log(VOCAB), abs=0.1)


def test_ignored_targets_weigh_nothing():
    """Rows without targets change neither loss nor gradient, even as a micro batch of their own."""
    batch = make_batch()
    rest = Batch(*(part[1:] for part in batch[:3]))
    whole, less = make_engine(), make_engine()
    assert whole.gradients(1, split(batch, 1)).read().loss == pytest.approx(
        less.gradients(1, [rest]).read().loss, rel=1e-6
    )
    for name, gradient in gathered(whole).items():
        torch.testing.assert_close(gradient, gathered(less)[name], rtol=1e-4, atol=1e-7)


def test_a_batch_without_any_target_is_no_error():
    batch = make_batch()
    found = make_engine().gradients(1, [batch._replace(targets=torch.full_like(batch.targets, -100))]).read()
    assert found.loss == 0 and found.grad_norm == 0


def test_norms_are_those_of_the_due_parameters():
    """Step 3 updates `fast` and, for its phase of 1, `slow`, whose sum of three gradients counts as a mean over 4."""
    engine = make_engine()
    sums: dict[str, Tensor] = {}
    for step in (1, 2, 3):
        _, gradients = plain(engine, make_batch(step))
        computed = engine.gradients(step, [make_batch(step)])
        found = computed.read()
        sums = {n: g + sums.get(n, 0) for n, g in gradients.items()}
        if step < 3:
            engine.update(step, computed)
            sums = {n: g for n, g in sums.items() if level_of(n) == "slow"}
    due = {n: g / 4 if level_of(n) == "slow" else g for n, g in sums.items() if level_of(n) != "mid"}
    assert found.grad_norm == pytest.approx(norm(due), rel=1e-4)
    assert found.waiting_norm == pytest.approx(norm({n: g for n, g in sums.items() if n not in due}) / 2, rel=1e-4)
    assert found.level_norms.keys() == {"fast", "slow"}
    for level, value in found.level_norms.items():
        assert value == pytest.approx(norm({n: g for n, g in due.items() if level_of(n) == level}), rel=1e-4)


def norm(gradients: dict[str, Tensor]) -> float:
    return torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()


def test_levels_are_named_only_when_due():
    engine = make_engine()
    seen = []
    for step in range(1, 5):
        computed = engine.gradients(step, [make_batch(step)])
        found = computed.read()
        engine.update(step, computed)
        seen.append(set(found.level_norms))
    assert seen == [{"fast"}, {"fast", "mid"}, {"fast", "slow"}, {"fast", "mid"}]


def test_an_update_changes_exactly_what_is_due_and_measures_it():
    engine = make_engine()
    weights = dict(engine.passes.model.named_parameters())
    for step in range(1, 5):
        before = {name: parameter.detach().clone() for name, parameter in weights.items()}
        computed = engine.gradients(step, [make_batch(step)])
        found = computed.read()
        changes = engine.update(step, computed, measure=step > 2).read()
        due = set(engine.optimizer.due(step))
        assert {name for name in weights if not torch.equal(weights[name], before[name])} == due
        assert changes.keys() == (set(found.level_norms) if step > 2 else set(found.level_norms) - {"fast"})
        for level, change in changes.items():
            moved = torch.cat([(weights[n].detach() - before[n]).flatten() for n in engine.levels[level]])
            assert change == pytest.approx(moved.square().mean().sqrt().item(), rel=1e-4)


def test_gradients_alone_change_no_weight():
    """So that a bad step can be refused."""
    engine = make_engine()
    before = {name: parameter.detach().clone() for name, parameter in engine.passes.model.named_parameters()}
    engine.gradients(4, [make_batch()])
    assert all(torch.equal(parameter, before[name]) for name, parameter in engine.passes.model.named_parameters())


@pytest.mark.parametrize("level", ["fast", "slow"])
def test_a_gradient_that_is_not_finite_is_seen_at_once_even_of_a_level_that_waits(level: str):
    engine = make_engine()
    weight = dict(engine.passes.model.named_parameters())[f"blocks.0.cms.levels.{level}.down.weight"]
    weight.register_hook(lambda gradient: gradient * math.nan)
    found = engine.gradients(1, [make_batch()]).read()
    assert math.isfinite(found.loss)
    norms = {"fast": found.grad_norm, "slow": found.waiting_norm}
    assert math.isnan(norms.pop(level)) and all(map(math.isfinite, norms.values()))


def test_low_precision_gathers_micro_batches_in_float32():
    """Fifteen times a bfloat16 number is seldom one."""
    once, often, batch = make_engine(torch.bfloat16), make_engine(torch.bfloat16), make_batch()
    once.passes.train([batch], lambda total: total / 1000, None)
    often.passes.train([batch] * 15, lambda total: total / 1000, None)
    single = gathered(once)
    for name, gradient in gathered(often).items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, 15 * single[name], rtol=1e-5, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_probes_come_on_request_and_change_nothing():
    quiet, asked = make_engine(), make_engine()
    without = quiet.gradients(1, split(make_batch(), 2)).read()
    found = asked.gradients(1, split(make_batch(), 2), probe=True).read()
    assert without.probe == {}
    names = ("eta_mean", "alpha_mean", "surprise", "state_norm", "tokens")
    assert found.probe.keys() == {f"memory/0/{name}" for name in names}
    assert not any(value.requires_grad for value in found.probe.values())
    assert found.loss == without.loss and found.grad_norm == without.grad_norm
    first = make_engine().gradients(1, split(make_batch(), 2)[:1], probe=True).read()
    assert all(torch.equal(found.probe[name], first.probe[name]) for name in found.probe)


def test_evaluation_is_the_mean_over_all_targets_and_leaves_no_gradient():
    engine, batch = make_engine(), make_batch()
    loss, _ = plain(engine, batch)
    assert engine.evaluate(split(batch, 3)) == pytest.approx(loss.item(), rel=1e-6)
    assert all(parameter.grad is None for parameter in engine.passes.model.parameters())
    assert engine.evaluate([]) == 0


@pytest.mark.parametrize("is_asked", [False, True])
def test_what_a_rank_asks_travels_with_the_norms_and_is_asked_after_the_backward_pass(is_asked: bool):
    engine, seen = make_engine(), []

    def ask() -> bool:
        seen.append(all(gradient.any() for name, gradient in gathered(engine).items() if name.endswith("down.weight")))
        return is_asked

    found = engine.gradients(1, split(make_batch(), 2), ask=ask).read()
    assert (
        seen == [True]
        and found.is_asked == is_asked
        and found.loss == make_engine().gradients(1, split(make_batch(), 2)).read().loss
    )


NAN, INF = float("nan"), float("inf")
UP, DOWN = torch.tensor(INF), torch.tensor(-INF)
NEVER, FULL, EMPTY = (None, None), (1.0, 2.0), (0.1, 0.0)
"""What a watch refuses, nats above and factor; losses and norms of a window that is full, and one whose norms are 0."""
VERDICTS = {
    "finite": (NEVER, FULL, (5.0, 7.0, 9.0), True),
    "the loss is nan": (NEVER, FULL, (NAN, 1.0, 1.0), False),
    "the loss is inf": ((3.0, 2.0), FULL, (INF, 1.0, 1.0), False),
    "the loss is -inf": ((3.0, 2.0), FULL, (-INF, 1.0, 1.0), False),
    "the norm is nan": (NEVER, FULL, (1.0, NAN, 1.0), False),
    "the norm is inf": ((3.0, 2.0), FULL, (1.0, INF, 1.0), False),
    "what waits is nan": (NEVER, FULL, (1.0, 1.0, NAN), False),
    "what waits is inf": ((3.0, 2.0), FULL, (1.0, 1.0, INF), False),
    "what waits has no limit": ((3.0, 2.0), FULL, (1.0, 1.0, 1e30), True),
    "a loss on its border": ((3.0, None), FULL, (4.0, 1e9, 1.0), True),
    "a loss above it": ((3.0, None), FULL, (4.0 + 2**-21, 1.0, 1.0), False),
    "a loss far above, without a limit": ((None, 2.0), FULL, (99.0, 1.0, 1.0), True),
    "a norm on its border": ((None, 2.0), FULL, (99.0, 4.0, 1.0), True),
    "a norm above it": ((None, 2.0), FULL, (1.0, 4.0 + 2**-21, 1.0), False),
    "a norm far above, without a limit": ((3.0, None), FULL, (1.0, 1e9, 1.0), True),
    "norms of 0 before": ((3.0, 2.0), EMPTY, (0.1, 9.0, 1.0), True),
    "the window is not full": ((3.0, 2.0), None, (99.0, 1e9, 1.0), True),
}


def verdicts(watch: LossWatch, loss: float, norm: float, waiting: float) -> tuple[bool, bool]:
    """Return whether a step is good by the device, and by the host, which judges it when it has read the numbers."""
    computed = Computed(torch.tensor([loss, 0.0, norm, waiting]), [], {})
    on_device = bool(computed.gate(watch.limits()).choose(1.0, 0.0))
    read = computed.read()
    return on_device, watch.judge(read.loss, read.grad_norm, read.waiting_norm) is None


@pytest.mark.parametrize("case", VERDICTS)
def test_the_device_and_the_host_judge_a_step_alike(case: str):
    spikes, before, step, is_good = VERDICTS[case]
    watch = LossWatch(*spikes, window=4)
    for _ in range(4 if before else 3):
        assert watch.judge(*(before or FULL)) is None
    assert verdicts(watch, *step) == (is_good, is_good)


def test_they_judge_alike_around_borders_that_no_float32_is():
    """A run of steps, each of which is next to its border: the mean of float32 numbers, as the host has it in float64.

    What is found good moves the border of the next.
    """
    watch, generator, seen = LossWatch(0.3, 1.7, window=3), torch.Generator().manual_seed(1), []
    for loss, norm in torch.rand(3, 2, generator=generator).tolist():
        watch.judge(2 + loss, 0.1 + norm)
    for number in range(400):
        limits = watch.limits()
        loss, norm = torch.tensor(limits.loss.base + limits.loss.most), torch.tensor(limits.grad_norm.most)
        beside = torch.nextafter(loss, (UP, DOWN)[number % 2]), torch.nextafter(norm, (UP, DOWN)[number % 2])
        step = [(loss, norm - 0.1), (beside[0], norm - 0.1), (loss - 0.1, norm), (loss - 0.1, beside[1])]
        on_device, on_host = verdicts(watch, *map(float, step[number // 2 % 4]), 0.0)
        assert on_device == on_host, f"{watch.limits()} {step}"
        seen.append(on_device)
        watch.judge(2 + 1 / (1 + number % 7), 0.1 + 1 / (1 + number % 5))
    assert 100 < sum(seen) < 300, "on either side"
