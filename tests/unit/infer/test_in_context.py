"""In-context levels equal a loop over periods, one sequence at a time, with autograd through the model's own layers."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from hopescale.common.errors import ConfigError
from hopescale.config.load import from_dict, to_dict
from hopescale.config.schema import ModelConfig, RunConfig
from hopescale.infer import in_context
from hopescale.infer.adaptation import Adaptation, InContextLevel, adaptation_of, read_adaptation
from hopescale.infer.in_context import InContextReader
from hopescale.models import Model, level_of

KINDS = {
    "hope": {"mixers": {"hope": {"chunk_size": 4}}},
    "independent": {"mixers": {"attention": {"kind": "attention"}}, "cms": {"variant": "independent"}},
    "attention": {"mixers": {"attention": {"kind": "attention"}}},
    "depth": {"mixers": {"attention": {"kind": "attention"}}, "cms": {"placement": "depth"}},
}

NEAR = {"rtol": 1e-5, "atol": 1e-7}
"""The loss is float32, whose rounding enters each step; a wrong count or period is off by thousands of that."""


@cache
def make_config(kind: str) -> ModelConfig:
    tree = to_dict(RunConfig())
    levels = {"fast": {"d_ff": 8}, "mid": {"d_ff": 8, "update_every_steps": 2}}
    levels["slow"] = {"d_ff": 8, "update_every_steps": 4}
    settings = KINDS[kind]
    tree["model"] = {
        "vocab_size": 24,
        "d_model": 8,
        "num_layers": 3 if kind == "depth" else 2,
        "num_heads": 2,
    } | settings
    tree["model"]["cms"] = {"levels": levels} | settings.get("cms", {})
    return from_dict(tree, "test").model


def make_model(kind: str = "attention", dtype: torch.dtype = torch.float64) -> Model:
    return Model(make_config(kind), seed=5).to(dtype).eval()


def make_text(rows: int, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(24, (rows, length + 1), generator=torch.Generator().manual_seed(length))
    targets = ids[:, 1:].clone()
    targets[0, length // 3 : length // 2] = -100
    return ids[:, :-1], targets


def read_all(
    model: Model, adaptation: Adaptation, tokens: Tensor, targets: Tensor, context: int | None = None
) -> tuple[Tensor, InContextReader]:
    reader = InContextReader(model, adaptation, len(tokens), context)
    return torch.cat(list(reader.read(tokens, targets)), 1), reader


def by_loop(
    model: Model, adaptation: Adaptation, tokens: Tensor, targets: Tensor, context: int | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The equation as a loop over the periods of one sequence `[T]`."""
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if level_of(n) in adaptation.levels}
    weights, state, logits = dict(trained), None, []
    gathered = {level: [] for level in adaptation.levels}
    periods = {level: cadence.period for level, cadence in adaptation.levels.items()}
    cuts = [*periods.values(), context or len(tokens)]
    borders = sorted({0, len(tokens), *(b for cut in cuts for b in range(0, len(tokens), cut))})
    for begin, end in pairwise(borders):
        state = None if context and begin % context == 0 else state
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        answer, state = functional_call(model, leaves, (tokens[None, begin:end], state))
        logits.append(answer[0].detach())
        losses = F.cross_entropy(answer[0], targets[begin:end], ignore_index=-100, reduction="none")
        slopes = dict(zip(leaves, torch.autograd.grad(losses.sum(), list(leaves.values())), strict=True))
        state = state._replace(
            layers=tuple(x.with_named({k: v.detach() for k, v in x.named().items()}) for x in state.layers)
        )
        stepped = []
        for level, period in periods.items():
            gathered[level].append((slopes, int((targets[begin:end] != -100).sum())))
            if end % period == 0:
                stepped.append(level)
                count = max(1, sum(n for _, n in gathered[level]))
                for name in (name for name in weights if level_of(name) == level):
                    total = sum(slope[name] for slope, _ in gathered[level])
                    weights[name] = weights[name] - adaptation.levels[level].rate / count * total
                gathered[level] = []
        if adaptation.nested:
            for level in periods:
                if any(periods[slower] > periods[level] for slower in stepped):
                    weights |= {name: trained[name] for name in trained if level_of(name) == level}
    return torch.cat(logits), weights


CASES = [
    ("hope", 11, "fast=4,slow=9,mid=6", None),
    ("independent", 13, "slow=6,fast=3@0.9", None),
    ("attention", 16, "fast=5,mid=12,slow=7", 8),
    ("depth", 9, "slow=3", None),
]


@pytest.mark.parametrize(("kind", "length", "cadences", "context"), CASES)
def test_a_batch_equals_a_loop_over_periods(kind: str, length: int, cadences: str, context: int | None):
    model, adaptation = make_model(kind), read_adaptation("--adapt", cadences, rate=0.5)
    tokens, targets = make_text(2, length)
    logits, reader = read_all(model, adaptation, tokens, targets, context)
    for row in range(2):
        expected, weights = by_loop(model, adaptation, tokens[row], targets[row], context)
        torch.testing.assert_close(logits[row], expected, **NEAR)
        assert weights.keys() == reader.weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(reader.weights[name][row], weight, **NEAR)
    moved = [n for n, p in model.named_parameters() if n in weights and not torch.equal(reader.weights[n][0], p)]
    due = {name for name, level in adaptation.levels.items() if level.period <= length}
    assert {level_of(name) for name in moved} == due


def test_nested_levels_return_when_the_next_slower_one_steps():
    model = make_model()
    adaptation = read_adaptation("--adapt", "fast=2,mid=6,slow=12@0", rate=0.5, nested=True)
    for length in (12, 17):
        tokens, targets = make_text(1, length)
        logits, reader = read_all(model, adaptation, tokens, targets)
        expected, weights = by_loop(model, adaptation, tokens[0], targets[0])
        torch.testing.assert_close(logits[0], expected, **NEAR)
        for name, weight in weights.items():
            torch.testing.assert_close(reader.weights[name][0], weight, **NEAR)
    named = dict(model.named_parameters())
    _, reader = read_all(model, adaptation, *make_text(1, 12))
    assert all(torch.equal(weight[0], named[name]) for name, weight in reader.weights.items())


def test_each_sequence_has_weights_of_its_own():
    model, adaptation = make_model("independent"), read_adaptation("--adapt", "fast=4,slow=6", rate=0.5)
    tokens, targets = make_text(3, 15)
    together, reader = read_all(model, adaptation, tokens, targets)
    for row in range(3):
        alone, own = read_all(model, adaptation, tokens[row : row + 1], targets[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], **NEAR)
        for name, weight in own.weights.items():
            torch.testing.assert_close(reader.weights[name][row], weight[0], **NEAR)
    first, second = (reader.weights["blocks.0.cms.levels.fast.up.weight"][row] for row in (0, 1))
    assert not torch.allclose(first, second)


def test_a_rate_of_zero_reads_as_the_model_does_bit_for_bit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(in_context, "PREFILL_TOKENS", 8)
    model, (tokens, targets) = make_model(dtype=torch.float32), make_text(2, 19)
    logits, _ = read_all(model, read_adaptation("--adapt", "fast=5,slow=12", rate=0), tokens, targets)
    state, expected = None, []
    with torch.no_grad():
        for part in tokens.split(8, 1):
            answer, state = model(part, state)
            expected.append(answer)
    assert torch.equal(logits, torch.cat(expected, 1))


def test_a_step_of_rate_zero_changes_no_weight():
    """With `nested` the machinery runs at a rate of 0, too: the slow level's weights stay the trained ones."""
    model = make_model()
    adaptation = Adaptation({"fast": InContextLevel(2, 0.5), "slow": InContextLevel(4, 0.0)}, nested=True)
    _, reader = read_all(model, adaptation, *make_text(2, 9))
    named = dict(model.named_parameters())
    slow = {name: weight for name, weight in reader.weights.items() if level_of(name) == "slow"}
    assert slow and all(torch.equal(weight[1], named[name]) for name, weight in slow.items())


def test_a_prediction_does_not_see_later_tokens():
    model, adaptation = make_model(), read_adaptation("--adapt", "fast=3,slow=6", rate=0.5)
    tokens, targets = make_text(1, 14)
    before, _ = read_all(model, adaptation, tokens, targets)
    tokens[0, 9:], targets[0, 8:] = (tokens[0, 9:] + 1) % 24, (targets[0, 8:] + 1) % 24
    after, _ = read_all(model, adaptation, tokens, targets)
    assert torch.equal(before[:, :9], after[:, :9]) and not torch.equal(before[:, 9:], after[:, 9:])


def test_bfloat16_weights_are_followed_in_float32():
    model = make_model(dtype=torch.float32).to_precision(torch.bfloat16)
    _, reader = read_all(model, read_adaptation("--adapt", "fast=4", rate=1e-3), *make_text(1, 9))
    weight = reader.weights["blocks.0.cms.levels.fast.up.weight"][0]
    trained = dict(model.named_parameters())["blocks.0.cms.levels.fast.up.weight"]
    assert weight.dtype == torch.float32 and trained.dtype == torch.bfloat16
    assert not torch.equal(weight, trained.float())


REFUSED = {
    "fast": "no level with a period",
    "fast=": "no level with a period",
    "fast=-4": "at least 1",
    "fast=0": "at least 1",
    "fast=2.5": "no level with a period",
    "fast=4@x": "no level with a period",
    "fast=4@-1": "at least 0",
    "fast=4@nan": "at least 0",
    "fast=4,fast=8": "more than once",
    "=4": "at least 1",
    "": "no level is named",
}


@pytest.mark.parametrize("text", REFUSED)
def test_cadences_that_are_none_are_refused(text: str):
    with pytest.raises(ConfigError, match=REFUSED[text]):
        read_adaptation("--adapt", text)


def test_a_config_has_a_cadence_of_its_own():
    model = make_config("attention")
    with pytest.raises(ConfigError, match="no level has update_every_tokens"):
        adaptation_of(model)
    slow = replace(model.cms.levels["slow"], update_every_tokens=64)
    changed = replace(model, cms=replace(model.cms, levels=model.cms.levels | {"slow": slow}))
    assert adaptation_of(changed, rate=0.5) == Adaptation({"slow": InContextLevel(64, 0.5)})


def test_levels_that_do_not_fit_are_refused():
    model = make_model().config
    with pytest.raises(ConfigError, match="quick cannot follow the text: the model has the levels fast, mid, slow"):
        read_adaptation("--adapt", "fast=2,quick=4").check(model)
    with pytest.raises(ConfigError, match="slow steps every 7 tokens, fast every 2"):
        read_adaptation("--adapt", "fast=2,slow=7", nested=True)
    with pytest.raises(ConfigError, match="--nested has no effect: fast alone"):
        read_adaptation("--adapt", "fast=2", nested=True)
    with pytest.raises(ConfigError, match="--rate is -1"):
        read_adaptation("--adapt", "fast=2", rate=-1.0)
