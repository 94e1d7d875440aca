"""Models judged on a suite against one position at a time; requests, and evaluations side by side."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hopescale.common.errors import ConfigError, DataError
from hopescale.config.schema import DataConfig, ModelConfig, RunConfig, SourceConfig, SuiteConfig, TrainConfig
from hopescale.data.loader import Batch
from hopescale.evals import suites
from hopescale.evals.comparison import compare, read_evaluations, spread
from hopescale.evals.comparison_plot import draw
from hopescale.evals.comparison_report import page, write_comparison
from hopescale.evals.positions import by_place, losses_of, parts
from hopescale.evals.suite_request import SuiteRequest, read_counts
from hopescale.evals.suite_result import suite_table
from hopescale.models import Model
from hopescale.suites import prose
from hopescale.suites.registry import TASKS, Generated, resolve
from tests.support.loaded import make_loaded, make_tokens
from tests.support.models import BASE


def trained_on(*tasks: SuiteConfig, seq_len: int = 40, vocab_size: int = 200) -> RunConfig:
    sources = {task.task: SourceConfig(suite=task) for task in tasks}
    model = ModelConfig(vocab_size=vocab_size)
    return RunConfig(model=model, data=DataConfig(sources=sources), train=TrainConfig(seq_len=seq_len))


@torch.no_grad()
def test_rows_in_parts_are_judged_as_every_position_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(suites, "PREFILL_TOKENS", 5)
    model = Model(BASE, seed=1).double().eval()
    generator = np.random.default_rng(0)
    tokens, targets = generator.integers(200, size=(2, 3, 13))
    targets[:, ::3] = -100
    for row, judged in enumerate(suites.judge(model, tokens, targets)):
        for place in range(13):
            if targets[row, place] == -100:
                assert np.isnan(judged.right[place]) and np.isnan(judged.loss[place])
                continue
            chances = model(torch.from_numpy(tokens[row : row + 1, : place + 1]))[0][0, -1].log_softmax(-1)
            assert judged.loss[place] == pytest.approx(-float(chances[targets[row, place]]), rel=1e-5)
            assert judged.right[place] == (int(chances.argmax()) == targets[row, place])


class Bytes:
    """A tokenizer of bytes."""

    eos_id = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


@torch.no_grad()
def test_a_model_with_a_tokenizer_is_asked_in_words():
    model = Model(replace(BASE, num_layers=1), seed=1).double().eval()
    loaded = SimpleNamespace(model=model, tokenizer=Bytes(), config=trained_on())
    control = SimpleNamespace(rank=0, num_ranks=1, gather=lambda own: [own])
    config = SuiteConfig(task="needle_multikey", value_length=2, num_pairs=2, length=34)
    (found,) = suites.ask(loaded, [config], 2, control, lambda line: None)
    assert (found.questions, found.chance, found.settings["unit"]) == (2, pytest.approx(0.01), "words")
    losses = []
    for example in Generated(config, seed=0, length=34).examples("test", [0, 1], seed=0):
        task, settings = TASKS[config.task], resolve(config)
        asked = np.flatnonzero(example.answers >= 0)
        words = [task.spell(int(word), settings) for word in [*example.tokens[: asked[0] + 1], *example.answers[asked]]]
        text = prose.text_of(words)
        assert re.search(r"Remember: \w+ holds \d\d$", text)
        ids = [0, *text.encode()]
        chances = model(torch.tensor([ids[:-1]]))[0][0].log_softmax(-1)
        losses.append(-sum(float(chances[place - 1, ids[place]]) for place in range(len(ids) - 3, len(ids))))
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_answers_are_counted_by_row_last_and_place():
    nan = np.nan
    right = np.array([[nan, 1, 1, nan], [nan, 1, 0, 1]])
    judged = [suites.Judged(row, np.where(np.isnan(row), nan, 0.5)) for row in right]
    targets = np.where(np.isnan(right), -100, 1)
    found = suites._result(SuiteConfig(task="parity", length=4), targets, judged)
    assert (found.questions, found.accuracy, found.exact, found.last) == (5, 0.8, 0.5, 1.0)
    assert found.loss == 0.5 and found.settings == {"length": 4}
    assert found.places == [(1, 1, 1.0), (2, 2, 0.5), (3, 3, 1.0)]
    # Per row 2 of 2 and 2 of 3: deviations from 0.8 of 0.4 and -0.4 answers, over 5 answers.
    assert found.stderr == pytest.approx(np.sqrt(2 * 0.4**2) / 5)
    assert [line.split()[0] for line in suite_table([found])] == ["suite", "parity"]


def test_points_begin_with_what_a_model_was_trained_on():
    config = trained_on(SuiteConfig(task="mqar", num_symbols=32), SuiteConfig(task="anbn", length=20))
    points = SuiteRequest(("trained", "anbn", "aa")).points(config)
    assert [(point.task, point.length, point.shortest) for point in points] == [
        *(("mqar", length, None) for length in (40, 80, 160)),
        *(("anbn", 20, None), ("anbn", 40, 21), ("anbn", 80, 41)),
        *(("aa", length, None) for length in (64, 128, 256)),
    ]
    assert {point.num_symbols for point in points if point.task == "mqar"} == {32}


def test_settings_are_varied_where_a_task_has_them():
    config = trained_on(SuiteConfig(task="mqar"), SuiteConfig(task="parity"))
    points = SuiteRequest(("trained", "translation"), pairs=(4, 12)).points(config)
    assert [(point.task, point.num_pairs, point.length, point.language) for point in points] == [
        ("mqar", 4, 40, None),
        ("mqar", 12, 48, None),
        *(("parity", None, length, None) for length in (40, 80, 160)),
        *(("translation", None, length, language) for language in ("first", "second") for length in (64, 128, 256)),
    ]


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"names": ("parrity",)}, "parrity, which is no suite"),
        ({"names": (), "pairs": (3,)}, "no effect without --suite"),
        ({"names": ("position",), "pairs": (3,)}, "no effect on position"),
        ({"names": ("parity",), "pairs": (3,)}, "parity have no num_pairs"),
        ({"names": ("trained",)}, "no source of the run"),
        ({"names": ("memorise",)}, "memorise has 257 symbols, but model.vocab_size is 200"),
        ({"names": ("mqar",), "lengths": (16,)}, "mqar with these settings needs 32 tokens"),
        ({"names": ("mqar", "facts"), "words": True}, "reads text, and mqar have no words"),
    ],
)
def test_requests_without_effect_are_refused(request_, said):
    words = request_.pop("words", False)
    with pytest.raises(ConfigError, match=said):
        SuiteRequest(**request_).points(trained_on(), words=words)


def test_a_model_of_text_is_asked_in_ids_what_it_was_trained_on():
    config = trained_on(SuiteConfig(task="parity"))
    assert {point.task for point in SuiteRequest(("trained", "facts")).points(config, words=True)} == {
        "parity",
        "facts",
    }


def test_counts_are_read():
    assert read_counts("--length", "64, 128") == (64, 128) and read_counts("--length", "") == ()
    for text in ("64,x", "64,64", "-3"):
        with pytest.raises(ConfigError, match="--length"):
            read_counts("--length", text)


def test_parts_of_a_row_double():
    assert list(parts(300)) == [(0, 64), (64, 128), (128, 256), (256, 300)]


def test_places_count_from_the_beginning_of_a_document():
    losses = np.full((2, 130), 1.0)
    documents = np.zeros((2, 130), int)
    documents[0, 66:], losses[0, 66:] = 1, 3.0  # 64 tokens of it are in the first part
    losses[1, 64:] = 5.0
    losses[:, 0] = np.nan
    found = {low: loss for low, _, loss in by_place(losses, documents)}
    assert found[0] == pytest.approx((63 + 64 * 3 + 63) / 190)
    assert found[64] == pytest.approx((2 + 64 * 5) / 66) and found[128] == 5.0


@pytest.mark.parametrize("within", [False, True])
def test_documents_of_a_row_are_read_apart_where_the_model_does(within: bool):
    loaded = make_loaded(within_documents=within)
    tokens, documents = make_tokens(12), torch.tensor([[0] * 5 + [1] * 7])
    (losses,) = losses_of(loaded, [Batch(tokens, tokens.roll(-1, 1), documents)])
    (alone,) = losses_of(loaded, [Batch(tokens[:, 5:], tokens.roll(-1, 1)[:, 5:], documents[:, 5:])])
    assert np.allclose(losses[5:], alone, atol=1e-6) == within


def body(model: str, seed: int, accuracy: float, *, step: int = 10, lr: float = 1e-3, length: int = 40) -> dict:
    numbers = {"exact": 0.1, "last": 0.2, "loss": 1.0, "stderr": 0.01, "chance": 0.5, "best": 1.0}
    one = {"task": "mqar", "settings": {"length": length, "num_pairs": 4}, "accuracy": accuracy, **numbers}
    places = [(0, 63, 3.0), (64, 127, 2.0)]
    return {
        "model": model,
        "step": step,
        "config": {"name": "a", "train": {"seed": seed, "seq_len": 40}, "data": {"seed": 0}, "optim": {"lr": lr}},
        "results": {"perplexity/main": {"metrics": {"loss": 2.5}, "stderr": {}}},
        "suites": [one],
        "positions": [{"name": "main", "length": 128, "rows": 2, "places": places}],
    }


def test_runs_that_differ_in_seeds_are_one_system():
    bodies = [body("a", 0, 0.5), body("b", 1, 0.7), body("c", 2, 0.9, lr=1e-2), body("b", 1, 0.8)]
    found = compare(bodies)
    assert [(system.title, len(system.models)) for system in found.systems] == [("a, step 10", 2), ("a #2, step 10", 1)]
    (point,) = found.suites
    pair, alone = point.values["a, step 10"]["accuracy"], point.values["a #2, step 10"]["accuracy"]
    assert (pair.mean, pair.seeds, alone.mean) == (pytest.approx(0.65), 2, 0.9), "the later 0.8 replaces 0.7"
    # Student's t of one degree of freedom: 12.706; the deviation is 0.15 sqrt 2, its mean's 0.15.
    assert pair.high == pytest.approx(0.65 + 12.706 * 0.15) and alone.high is None and alone.stderr == 0.01
    assert [dict(one.settings)["first"] for one in found.positions] == [0, 64]
    assert spread([1.0] * 40, None).high == 1.0


def test_models_are_known_by_their_weights():
    """Another checkpoint of an equal name, and an export, which is the same model again."""
    one, other = body("a", 0, 0.5) | {"weights": "1234567890"}, body("a", 1, 0.7) | {"weights": "abcdefghij"}
    export = body("export", 0, 0.9) | {"weights": "1234567890"}
    found = compare([one, other, export])
    (system,) = found.systems
    assert system.models == ("a at step 10 (12345678)", "a at step 10 (abcdefgh)")
    accuracy = found.suites[0].values[system.title]["accuracy"]
    assert (accuracy.mean, accuracy.seeds) == (pytest.approx(0.8), 2), "the export's 0.9 replaces 0.5"


def test_a_system_is_called_by_what_its_runs_are_called_alike():
    names = ["a-lr0.1-seed0", "a-lr0.1-seed1", "b-seed0"]
    bodies = [body(name, seed, 0.5, lr=lr) for name, seed, lr in zip(names, (0, 1, 0), (0.1, 0.1, 0.2), strict=True)]
    for one, name in zip(bodies, names, strict=True):
        one["config"]["name"] = name
    assert [system.label for system in compare(bodies).systems] == ["a-lr0.1", "b-seed0"]


def test_levels_that_follow_a_text_are_systems_of_their_own():
    """The same checkpoint, with the digest of its weights as each evaluation had it."""
    adapt = {"levels": {"fast": {"period": 8, "rate": 0.5}}, "nested": False}
    plain = body("a", 0, 0.5) | {"weights": "1234567890", "settings": {}}
    bodies = [plain, plain | body("a", 0, 0.6) | {"settings": {"adapt": adapt}}]
    bodies.append(body("a", 0, 0.7) | {"weights": "abcdefghij", "settings": {"levels": "notes"}})
    bodies.append(body("a", 1, 0.8) | {"weights": "klmnopqrst", "settings": {"adapt": adapt}})
    found = compare(bodies)
    adapted = "a, adapt fast every 8 at 0.5, step 10"
    assert [(system.title, len(system.models)) for system in found.systems] == [
        ("a, step 10", 1),
        (adapted, 2),
        ("a, levels notes abcdefgh, step 10", 1),
    ]
    means = [values["accuracy"].mean for values in found.suites[0].values.values()]
    assert means == pytest.approx([0.5, 0.7, 0.7])


def test_answers_to_more_examples_are_another_row():
    bodies = [body("a", 0, 0.5), body("b", 1, 0.7)]
    for one, examples in zip(bodies, (64, 256), strict=True):
        one["suites"][0]["examples"] = one["results"]["perplexity/main"]["samples"] = examples
    found = compare(bodies)
    assert [dict(point.settings)["examples"] for point in found.suites] == [64, 256]
    assert [point.values["a, step 10"]["accuracy"].seeds for point in found.suites] == [1, 1]
    assert len(found.others) == 2 and len(found.positions) == 2, "rows of positions are as many in both"


def test_a_report_is_one_json_one_page_and_figures(tmp_path: Path):
    bodies = []
    for seed, step in product((0, 1), (10, 20)):
        both = [body("a", seed, 0.5 + seed / 10, step=step, length=length) for length in (40, 80)]
        points = [suite for one in both for suite in one["suites"]]
        bodies.append(both[0] | {"model": f"a{seed}", "suites": points})
    names = {file.name for file in write_comparison(compare(bodies), tmp_path)}
    assert names == {"report.json", "report.md", "accuracy_by_length.png", "forgetting.png", "loss_by_position.png"}
    assert {file.name for file in tmp_path.iterdir()} == names
    read = json.loads((tmp_path / "report.json").read_text())
    assert [point["values"]["a, step 10"]["accuracy"]["seeds"] for point in read["suites"]] == [2, 2]
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert "| mqar | length 40 | 0.500 | 1.000 | 0.550 [-0.085, 1.185] (2) | 0.550 [-0.085, 1.185] (2) |" in lines
    assert "| main | length 128, first 64, last 127 | 2.000 [2.000, 2.000] (2) | 2.000 [2.000, 2.000] (2) |" in lines
    assert list(page(replace(compare(bodies), suites=(), positions=(), others=()), []))[-1].startswith("| a, step 20")


def test_a_report_of_many_systems_has_a_row_for_each_and_one_legend(tmp_path: Path):
    bodies = []
    for number in range(15):
        both = [body(f"run{number}", 0, number / 20, length=length, lr=number + 1) for length in (40, 80)]
        bodies.append(both[0] | {"suites": [suite for one in both for suite in one["suites"]]})
    comparison = compare(bodies)
    lines = list(page(comparison, []))
    assert "| system | mqar, length 40 | mqar, length 80 |" in lines
    assert "| chance | 0.500 | 0.500 |" in lines and "| best | 1.000 | 1.000 |" in lines
    assert sum(line.startswith("| a") and line.count(" ± ") == 2 for line in lines) == 15
    figure = draw(comparison)["accuracy_by_length"]
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][:2] == ["a, step 10", "a #2, step 10"]
    panel = figure.axes[0].get_window_extent()
    assert panel.height > 0.6 * figure.bbox.height and panel.x1 < legend.get_window_extent().x0
    drawn = {
        (line.get_color(), line.get_marker()) for line in figure.axes[0].get_lines() if line.get_marker() != "None"
    }
    assert len(drawn) == 15, "no two systems look alike"


@pytest.mark.parametrize(
    ("text", "said"), [(None, "no evaluations"), ("{", "cannot read"), ("[]", "is no evaluation"), ("{}", "it lacks")]
)
def test_what_is_no_evaluation_is_refused(tmp_path: Path, text: str | None, said: str):
    path = tmp_path
    if text is not None:
        path = tmp_path / "x.json"
        path.write_text(text)
    with pytest.raises(DataError, match=said):
        read_evaluations([path])
