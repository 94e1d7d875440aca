"""A run with another rule for matrices: it resumes bit for bit, keeps its rules, and begins anew only when asked to."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from conftest import Run

LINEAR = "['*_proj.weight', '*.gate.weight', '*.up.weight', '*.down.weight']"
PATTERNS = "['*_proj.weight', '*.gate.weight', '*.up.weight', '*.down.weight', '*.banks.*']"
STATES = {
    "muon": {"momentum_buffer"},
    "m3": {"step", "fast_momentum", "slow_momentum", "slow_direction", "second_moment"},
    "delta_momentum": {"step", "momentum_buffer"},
    "deep_momentum": {"memory_w1", "memory_w2"},
    "dgd": {"gram.accumulator.0"},
}


def using(rule: str) -> str:
    match = LINEAR if rule == "dgd" else PATTERNS
    return f"optim.groups.matrices={{rule: {rule}, match: {match}}}"


@pytest.mark.parametrize(
    ("rule", "precision"),
    [
        ("muon", "bf16"),
        ("m3", "fp32"),
        ("m3", "bf16"),
        ("delta_momentum", "bf16"),
        ("deep_momentum", "fp32"),
        ("dgd", "bf16"),
    ],
)
def test_a_run_in_two_parts_equals_itself(train, run: Run, rule: str, precision: str, tmp_path):
    overrides = (using(rule), f"train.precision={precision}")
    assert train(*overrides).code == 0
    whole, name = run.tensors(10), "optimizer.blocks.0.cms.levels.slow.up.weight."
    states = {key.removeprefix(name) for key in whole if key.startswith(name)} - {"accumulator.0"}
    assert states == STATES[rule] | ({"master"} if precision == "bf16" else set())
    run.path.rename(tmp_path / "whole")
    assert train(*overrides, "--stop-at", 5).code == 0
    assert train(*overrides).code == 0
    parts = run.tensors(10)
    assert parts.keys() == whole.keys() and all(torch.equal(parts[key], whole[key]) for key in whole)


def test_a_rule_stays_unless_the_optimizer_begins_anew(train, run: Run):
    bf16 = "train.precision=bf16"
    assert train(using("m3"), bf16, "--stop-at", 5).code == 0
    before = run.tensors(5)
    refused = train(using("muon"), bf16)
    assert refused.code == 2 and "--reset-optimizer" in refused.err
    assert "optim.groups.matrices.rule: is muon, but blocks.0.mixer.in_proj.weight was updated by m3" in refused.err
    refused = train(bf16)
    assert refused.code == 2 and "optim.groups.decay.rule: is adamw, but" in refused.err
    again = train(using("muon"), bf16, "--reset-optimizer", "optim.lr=1e-30", "--stop-at", 6)
    assert again.code == 0 and "at step 5 with a new optimizer" in again.out
    after = run.tensors(6)
    name = "blocks.0.cms.levels.fast.up.weight"
    assert torch.equal(after[f"model.{name}"], before[f"model.{name}"])
    assert f"optimizer.{name}.momentum_buffer" in after and f"optimizer.{name}.fast_momentum" not in after
    assert after["optimizer.embedding.weight.step"] == 1
    for weight in ("blocks.0.cms.levels.fast.up.weight", "embedding.weight"):
        assert torch.equal(after[f"optimizer.{weight}.master"], before[f"model.{weight}"].float())
    assert train(using("muon"), bf16).code == 0


@pytest.mark.parametrize(
    ("rule", "was", "now", "message"),
    [
        (
            "m3",
            "m3.alpha_slow=0.5",
            "m3.second_moment=false",
            "second_moment: is false, but the .* of m3 with true",
        ),
        ("m3", "m3.alpha_slow=0", "m3.alpha_slow=0.5", "alpha_slow: is 0.5, but the .* state of m3 with 0"),
        ("delta_momentum", "delta_momentum.beta2=0.9", "delta_momentum.beta2=null", "beta2: is null, but .* with 0.9"),
        ("deep_momentum", "deep_momentum.memory_dim=8", "deep_momentum.memory_dim=32", "dim: is 32, but .* with 8"),
        (
            "deep_momentum",
            "deep_momentum.alpha=0.9",
            "deep_momentum.memory=linear",
            "memory: is linear, .* with mlp",
        ),
    ],
)
def test_settings_that_decide_the_state_stay(train, rule: str, was: str, now: str, message: str):
    assert train(using(rule), f"optim.{was}", "--stop-at", 1).code == 0
    refused = train(using(rule), f"optim.{now}")
    assert refused.code == 2 and "--reset-optimizer" in refused.err and "does not fit" not in refused.err
    assert re.search(rf"optim\.{rule}\.\w*{message}", refused.err), refused.err
    if rule == "delta_momentum":
        assert train(using(rule), f"optim.{now}", "--reset-optimizer", "--stop-at", 2).code == 0


@pytest.mark.parametrize("rule", ["m3", "deep_momentum"])
def test_other_settings_may_change(train, rule: str):
    was, now = {
        "m3": ("m3.alpha_slow=0.5", "m3.alpha_slow=0.25"),
        "deep_momentum": ("deep_momentum.memory_dim=32", "deep_momentum.memory_dim=null"),
    }[rule]
    assert train(using(rule), f"optim.{was}", "--stop-at", 4).code == 0
    assert train(using(rule), f"optim.{now}").code == 0


def test_a_new_run_has_no_optimizer_to_begin_anew(train):
    outcome = train("--reset-optimizer")
    assert outcome.code == 4 and "--reset-optimizer, but" in outcome.err


def test_a_vector_is_refused_by_a_rule_for_matrices(train):
    outcome = train("optim.groups.no_decay.rule=m3")
    assert outcome.code == 2
    assert "optim.groups.no_decay.rule: m3 updates matrices, but blocks.0.norm.weight has shape [16]" in outcome.err


def test_what_is_no_layer_is_refused_by_a_rule_that_needs_inputs(train):
    outcome = train(using("m3"), "optim.groups.matrices.rule=dgd")
    assert outcome.code == 2
    assert "dgd needs the inputs of a linear layer, but blocks.0.mixer.banks." in outcome.err
    assert "is not the weight of one" in outcome.err and "with another rule, such as adamw" in outcome.err
    outcome = train("optim.groups.matrices={rule: dgd, match: ['embedding.weight']}")
    assert outcome.code == 2 and "of a linear layer, but embedding.weight is not the weight of one" in outcome.err


def test_a_wider_model_trains_with_the_rates_of_its_base(train, run: Run):
    transfer = ("model.transfer={base_width: 4}", using("m3"))
    assert train(*transfer, "--stop-at", 5).code == 0
    rates = {line.split()[-1]: line.split()[:2] for line in (run.path / "groups.txt").read_text().splitlines()}
    assert rates["blocks.0.mixer.in_proj.weight"] == ["matrices*0.5", "1.500e-03"]
    assert rates["blocks.0.mixer.banks.memory.mem.w2"] == ["matrices", "3.000e-03"]
    assert rates["embedding.weight"] == ["decay", "3.000e-03"]
    refused = train("model.transfer={base_width: 8}", using("m3"))
    assert refused.code == 2 and "model.transfer.base_width: is 4 in the run folder, now 8" in refused.err
    refused = train(*transfer[:1], using("muon"))
    assert refused.code == 2 and "optim.groups.matrices.rule: is muon, but" in refused.err
    assert train(*transfer).code == 0


def test_a_rule_that_takes_an_embedding_for_a_matrix_is_refused_for_a_wider_model(train):
    refused = train("model.transfer={base_width: 4}", "optim.groups.decay.rule=muon")
    assert refused.code == 2 and "holds at every width for embedding.weight, which is no linear map" in refused.err
