from __future__ import annotations

from pathlib import Path

import pytest

from hopescale.common.errors import ConfigError
from hopescale.cost.flops import flops_per_token
from hopescale.cost.params import count_params
from hopescale.sweep.grid import columns, load_sweep, make_trials

ISOFLOP = """
name: toy
series:
  hope:
    recipe: debug
    rules: {model.cms.levels.fast.d_ff: "multiple(8 / 9 * d_model, 4)"}
  transformer: {recipe: transformer_tiny, set: {model.vocab_size: 128}}
set: {train.seq_len: 32}
sizes:
  w32: {model.d_model: 32}
  w64: {model.d_model: 64}
flops: [1e10, 4e10]
rules:
  train.global_batch_tokens: min(pow2(C / 1e8), 256)
  train.micro_batch_size: batch / seq_len
  optim.lr: 0.01 * (32 / d_model) ** 0.5
  optim.schedule.warmup_steps: round(steps / 10)
"""


@pytest.fixture
def sweep(tmp_path: Path):
    """Load a sweep from its text."""

    def load(text: str):
        path = tmp_path / "sweep.yaml"
        path.write_text(text)
        return load_sweep(path)

    return load


def problems_of(make) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.problems, caught.value
    return {problem.key: str(problem) for problem in caught.value.problems}


def test_an_isoflop_design_spends_its_budget_at_every_size(sweep):
    trials = make_trials(sweep(ISOFLOP))
    assert [trial.name for trial in trials[:3]] == ["hope-w32-c1e10", "hope-w32-c4e10", "hope-w64-c1e10"]
    assert len(trials) == 8 and columns(trials) == ["size", "budget"]
    for trial in trials:
        config, budget = trial.config, float(trial.labels["budget"])
        assert trial.params == count_params(config.model)["total"]
        batch, cost = config.train.global_batch_tokens, flops_per_token(config.model, 32)
        assert trial.flops == round(trial.tokens * cost) and abs(trial.flops - budget) <= cost * batch / 2
        assert batch == {"1e10": 128, "4e10": 256}[trial.labels["budget"]]
        assert config.train.micro_batch_size == batch / 32
        assert config.optim.lr == pytest.approx(0.01 * (32 / config.model.d_model) ** 0.5, rel=1e-5)
        assert config.optim.schedule.warmup_steps == round(trial.steps / 10)
        assert config.name == trial.name
    hope, transformer = trials[2].config.model, trials[6].config.model
    assert hope.cms.levels["fast"].d_ff == 56 and list(hope.mixers) == ["hope"]
    assert list(transformer.mixers) == ["attention"] and transformer.vocab_size == 128


def test_a_grid_of_any_keys(sweep):
    text = """
    name: toy
    recipe: transformer_tiny
    axes:
      model.mixers.attention.kind: [self_modifying, attention]
      optim.lr: [1e-3, 3e-3]
    set: {train.steps: 7}
    """
    trials = make_trials(sweep(text))
    assert [trial.name for trial in trials] == [
        "kindself_modifying-lr0.001",
        "kindself_modifying-lr0.003",
        "kindattention-lr0.001",
        "kindattention-lr0.003",
    ]
    assert {trial.series for trial in trials} == {"transformer_tiny"} and {trial.steps for trial in trials} == {7}
    assert columns(trials) == ["model.mixers.attention.kind", "optim.lr"]
    assert trials[3].config.model.mixers["attention"].kind == "attention" and trials[3].config.optim.lr == 3e-3


def test_horizons_in_tokens(sweep):
    trials = make_trials(sweep("name: toy\nrecipe: debug\ntokens: [64Ki, 2 * N]"))
    batch = trials[0].config.train.global_batch_tokens
    assert trials[0].tokens == 65536 and abs(trials[1].tokens - 2 * trials[1].params) <= batch / 2
    assert [trial.name for trial in trials] == ["d64Ki", "d2_N"]


def test_a_file_alone_is_one_trial(sweep):
    (trial,) = make_trials(sweep("recipe: debug"))
    assert trial.name == "trial" and trial.tokens == trial.steps * trial.config.train.global_batch_tokens


def test_a_recipe_beside_the_file_is_found_first(sweep, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("base: debug\ntrain: {steps: 3}\n")
    (trial,) = make_trials(sweep("recipe: mine.yaml"))
    assert trial.steps == 3 and trial.recipe == tmp_path / "mine.yaml"


def test_all_that_is_wrong_with_the_file_is_said_at_once(sweep):
    problems = problems_of(lambda: sweep("nmae: x\nflops: [abc]\nseries: {hope: {recpie: debug}}\naxes: {optim.lr: 3}"))
    assert "did you mean name?" in problems["nmae"]
    assert "expected" in problems["flops"] and "expected" in problems["axes.optim.lr"]
    assert "did you mean series.hope.recipe?" in problems["series.hope.recpie"]


def test_what_would_do_nothing_is_an_error(sweep):
    problems = problems_of(
        lambda: sweep(
            """
            name: a/b
            flops: [1e10, -1]
            tokens: [3]
            set: {train.steps: 3}
            sizes: {s: {optim.lr: 1, model.d_model: 8}}
            axes: {optim.lr: [1], model.num_layers: []}
            rules: {model.d_model: 3}
            """
        )
    )
    assert problems.keys() == {
        "name",
        "recipe",
        "tokens",
        "flops",
        "axes.model.num_layers",
        "sizes.s.model.d_model",
        "set.train.steps",
        "axes.optim.lr",
    }


def test_a_value_that_a_rule_or_a_horizon_decides_is_an_error(sweep):
    problems = problems_of(
        lambda: sweep(
            """
            recipe: debug
            flops: [1e12]
            set: {optim.lr: 1, train.seq_len: 32}
            series: {a: {set: {optim.lr: 2, train.seed: 3, train.steps: 4}, rules: {train.seed: 1}}, b: {}}
            rules: {optim.lr: 0.1, train.seq_len: 2 * seq_len}
            """
        )
    )
    assert problems.keys() == {
        "set.optim.lr",
        "series.a.set.optim.lr",
        "series.a.set.train.seed",
        "series.a.set.train.steps",
    }


@pytest.mark.parametrize(
    ("horizon", "key", "message"),
    [
        ("tokens: [0]", "tokens", "must be above 0"),
        ("tokens: [-5]", "tokens", "must be above 0"),
        ("tokens: [N - N]", "tokens", "must be above 0"),
        ("tokens: [500]", "tokens", "less than half a step of 1,024 tokens"),
        ("flops: [1e9]", "flops", "less than half a step of 1,024 tokens"),
        ("flops: [1e9]\nrules: {train.global_batch_tokens: 0}", "train.global_batch_tokens", "at least 1"),
    ],
)
def test_a_horizon_of_no_step_is_refused(sweep, horizon: str, key: str, message: str):
    problems = problems_of(lambda: make_trials(sweep(f"recipe: debug\n{horizon}")))
    assert problems.keys() == {key} and message in problems[key]


def test_problems_of_trials_are_said_once_with_the_trials_named(sweep):
    text = """
    name: toy
    recipe: debug
    sizes:
      good: {model.d_model: 32}
      odd: {model.d_model: 33}
    axes: {optim.lr: [1e-3, 2e-3]}
    rules: {train.seed: 10 * steps + wat}
    """
    problems = problems_of(lambda: make_trials(sweep(text)))
    assert "trial good-lr0.001 and 3 more" in problems["rules.train.seed"] and "wat" in problems["rules.train.seed"]
    problems = problems_of(lambda: make_trials(sweep(text.replace(" + wat", ""))))
    assert problems.keys() == {"model.d_model"} and "trial odd-lr0.001 and 1 more" in problems["model.d_model"]
    problems = problems_of(lambda: make_trials(sweep("recipe: debug\nset: {train.stpes: 3, optim.lr: fast}")))
    assert "did you mean train.steps?" in problems["train.stpes"] and "optim.lr" in problems


def test_trials_of_one_name_are_refused(sweep):
    with pytest.raises(ConfigError, match="more than one trial of the name"):
        make_trials(sweep("recipe: debug\naxes: {optim.lr: [1e-3, 0.001]}"))


def test_an_unknown_sweep_names_the_shipped_ones(tmp_path: Path):
    problems = problems_of(lambda: load_sweep(tmp_path / "none.yaml"))
    assert "hope_vs_transformer" in next(iter(problems.values()))


def test_shipped_sweeps_load_and_plan():
    trials = make_trials(load_sweep(Path("hope_vs_transformer")))
    assert len(trials) == 30 and {trial.series for trial in trials} == {"hope", "transformer"}


def test_trials_share_no_mirror(sweep):
    with pytest.raises(ConfigError, match="checkpoint.mirror: memory://runs would take the checkpoints of all trials"):
        make_trials(sweep("recipe: debug\nset: {checkpoint.mirror: 'memory://runs'}"))
