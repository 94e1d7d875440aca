"""`hopescale adapt` on a run trained by the command line, and its levels in other verbs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hopescale.infer.level_state import read_levels
from hopescale.infer.load import load_model

SETTINGS = ("train.steps=2", "train.validation.every=null", "train.validation.tokens=64", "data.seed=3")
LEVELS = ("--levels", "fast=16,slow=64", "--rate", 0.5)
PARTS = ("--parts", 3, "--probe", 20)
GENERATE = ("--prompt", "1 2 3", "--max-tokens", 8)


@pytest.fixture(scope="module")
def trained(hopescale, tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("adapt") / "run"
    done = hopescale("train", "debug", *tiny, *SETTINGS, "--run-dir", run)
    assert done.code == 0, done.err
    return run


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text in which one symbol follows another for ever."""
    file = tmp_path_factory.mktemp("stream") / "stream.txt"
    file.write_text(" ".join(str(number % 12) for number in range(200)))
    return file


@pytest.fixture(scope="module")
def adapted(hopescale, trained: Path, stream: Path) -> Path:
    out = trained / "levels"
    done = hopescale("adapt", trained, stream, *LEVELS, *PARTS, "--out", out)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0].split() == ["part", "tokens", "read", "trained", "then", "now"]
    return out


def test_levels_learn_and_a_pass_that_is_done_stays(hopescale, trained: Path, stream: Path, adapted: Path):
    body = json.loads((adapted / "report.json").read_text())
    assert body["levels"]["fast"] == {"period": 16, "rate": 0.5} and body["edges"] == [0, 66, 133, 199]
    assert body["after"][-1][-1] < body["trained"][-1]
    before = {file.name: file.read_bytes() for file in adapted.iterdir()}
    again = hopescale("adapt", trained, stream, *LEVELS, *PARTS, "--out", adapted)
    assert again.code == 0 and "goes on after 199 of 199 tokens" in again.err
    assert {file.name: file.read_bytes() for file in adapted.iterdir()} == before
    zero = hopescale("adapt", trained, stream, *LEVELS[:2], "--rate", 0, *PARTS, "--out", trained / "zero")
    assert zero.code == 0
    frozen = json.loads((trained / "zero" / "report.json").read_text())
    assert frozen["after"][-1] == frozen["trained"] == body["trained"] and frozen["read"][2] > body["read"][2]


def test_levels_are_loaded_where_a_model_answers(hopescale, trained: Path, adapted: Path, tmp_path: Path):
    plain, moved = (hopescale("generate", trained, *GENERATE, *given) for given in ((), ("--levels", adapted)))
    assert plain.code == moved.code == 0 and plain.out != moved.out
    frozen = hopescale("generate", trained, *GENERATE, "--levels", trained / "zero")
    assert frozen.out == plain.out
    done = hopescale("convert", "to-hf", trained, tmp_path / "hf", "--levels", adapted, "--no-verify")
    assert done.code == 0, done.err
    loaded = load_model(trained, torch.device("cpu"))
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    for name, weight in read_levels(adapted, loaded).items():
        assert torch.equal(load_file(file)[name], weight.to(dict(loaded.model.named_parameters())[name].dtype))


def test_processes_that_split_the_model_equal_one(hopescale, trained: Path, stream: Path, adapted: Path):
    out = trained / "split"
    command = ("adapt", trained, stream, *LEVELS, *PARTS, "--out", out)
    done = hopescale(*command, "--nproc", 2)
    assert done.code == 0 and "[rank 1]" not in done.err, done.err
    whole, split = (json.loads((folder / "report.json").read_text()) for folder in (adapted, out))
    assert whole.keys() == split.keys()
    for figure in ("read", "trained"):
        assert split.pop(figure) == pytest.approx(whole.pop(figure), rel=1e-5)
    for row, expected in zip(split.pop("after"), whole.pop("after"), strict=True):
        assert row == pytest.approx(expected, rel=1e-5)
    assert split == whole, "the same settings and stream"
    loaded = load_model(trained, torch.device("cpu"))
    for name, weight in read_levels(out, loaded).items():
        torch.testing.assert_close(weight, read_levels(adapted, loaded)[name], rtol=1e-5, atol=1e-6)
    again = hopescale(*command)
    assert again.code == 0 and "goes on after 199 of 199 tokens" in again.err
    asked = hopescale("generate", trained, *GENERATE, "--levels", out)
    assert asked.code == 0


def test_an_export_is_split_too(hopescale, trained: Path, stream: Path, adapted: Path, tmp_path: Path):
    assert hopescale("convert", "to-hf", trained, tmp_path / "hf", "--no-verify").code == 0
    done = hopescale("adapt", tmp_path / "hf", stream, *LEVELS, *PARTS, "--out", tmp_path / "levels", "--nproc", 2)
    assert done.code == 0, done.err
    loaded = load_model(trained, torch.device("cpu"))
    assert read_levels(tmp_path / "levels", loaded).keys() == read_levels(adapted, loaded).keys()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("RUN", "STREAM", *LEVELS, "--out", "OUT", "--nproc", 3), 2, "cannot be split over 3 processes"),
        (("RUN", "STREAM", *LEVELS, "--parts", 2, "--out", "DONE", "--nproc", 2), 4, "parts is 2, but 3 there"),
    ],
)
def test_what_cannot_be_is_said_once_by_processes(
    hopescale, capfd: pytest.CaptureFixture, trained: Path, stream: Path, adapted: Path, options, code, said
):
    places = {"RUN": trained, "STREAM": stream, "OUT": trained / "none", "DONE": adapted}
    done = hopescale("adapt", *(places.get(option, option) for option in options))
    told = done.err + capfd.readouterr().err  # the first process writes to the terminal, the others through this one
    assert done.code == code and told.count(said) == 1, told
    assert "Traceback" not in told and "[rank" not in told
    assert not (trained / "none").exists()


def losses(hopescale, trained: Path, *options: object) -> dict[str, float]:
    out = trained / "found.json"
    out.unlink(missing_ok=True)
    done = hopescale("eval", trained, "--tasks", "perplexity", "--out", out, *options)
    assert done.code == 0, done.err
    return json.loads(out.read_text())["results"]["perplexity/markov"]["metrics"]


def test_held_out_rows_are_followed(hopescale, trained: Path, adapted: Path):
    plain = losses(hopescale, trained)
    assert losses(hopescale, trained, "--adapt", "fast=4@0,slow=8", "--rate", 0) == plain
    moved = losses(hopescale, trained, "--levels", adapted, "--adapt", "fast=4,slow=8", "--rate", 0.5)
    assert moved["loss"] != pytest.approx(plain["loss"])


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("eval", "RUN", "--tasks", "perplexity", "--rate", 0.5), 2, "no effect without --adapt"),
        (("eval", "RUN", "--tasks", "perplexity", "--adapt", "quick=8"), 2, "the levels fast, mid, slow"),
        (("adapt", "RUN", "STREAM", "--levels", "fast", "--out", "OUT"), 2, "no level with a period"),
        (("adapt", "RUN", "STREAM", *LEVELS, "--parts", 2, "--out", "DONE"), 4, "parts is 2, but 3 there"),
        (("adapt", "RUN", "STREAM", *LEVELS, "--out", "RUN"), 4, "holds no levels"),
        (("generate", "RUN", "--levels", "RUN"), 4, "there is no levels.json"),
    ],
)
def test_what_cannot_be_is_refused(hopescale, trained: Path, stream: Path, adapted: Path, options, code, said):
    places = {"RUN": trained, "STREAM": stream, "OUT": trained / "out", "DONE": adapted}
    done = hopescale(*(places.get(option, option) for option in options))
    assert done.code == code and said in done.err, done.err
    assert not (trained / "out").exists()
