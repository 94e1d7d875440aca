"""`hopescale eval` on a run trained by the command line, and on its export; no network."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer

from hopescale.convert.hf import load_export
from hopescale.evals.language_model import EvaluatedModel
from hopescale.observe.metrics import read_metrics
from hopescale.parallel.mesh import Mesh
from tests.integration.conftest import WORDS

TASKS = "choice,rolling,writing"
YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}, train: {file}}}}}
training_split: train
test_split: test
doc_to_text: "{{{{question}}}}"
metadata: {{version: 2.0}}
"""
KINDS = {
    "choice": """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "writing": """
output_type: generate_until
doc_to_target: "{{text}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}, {metric: bleu}]
""",
}
SIZES = (
    "model.vocab_size=300",
    "data.sources.markov=null",
    "data.max_epochs=100",
    "train.steps=8",
    "train.seq_len=32",
    "train.validation.tokens=300",
    "optim.lr=1e-2",
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one task of each kind, on questions of very different lengths."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = []
    for number in range(9):
        words = [WORDS[(number * place + place) % len(WORDS)] for place in range(1 + 2 * number)]
        choices = [" memory keeps", " level", " the state of a token writes"]
        text = f"note {number}: {' '.join(words)}"
        lines.append({"question": text, "choices": choices, "answer": number % 3, "text": f"{text}\n{text}\n"})
    file = folder / "questions.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for name, kind in KINDS.items():
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, file=file) + kind)
    return folder


@pytest.fixture(scope="module", params=["self_modifying", "attention"])
def trained(request, hopescale, tiny, text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("eval") / request.param
    mixer = (f"model.mixers.hope.kind={request.param}",)
    source = f"data.sources.text.path={text_data / 'data'}"
    done = hopescale("train", "debug", *tiny, *SIZES, *mixer, source, "--run-dir", run)
    assert done.code == 0, done.err
    return run


@pytest.fixture(scope="module")
def exported(hopescale, trained: Path) -> Path:
    out = trained.with_name(f"{trained.name}-hf")
    done = hopescale("convert", "to-hf", trained, out)
    assert done.code == 0, done.err
    return out


@pytest.fixture
def evaluate(hopescale, tasks: Path, tmp_path: Path) -> Callable[..., dict]:
    """Run `hopescale eval` and return the report."""

    def run(model: Path, *args: object, names: str = TASKS) -> dict:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        where = ("--task-path", tasks) if names not in ("", "perplexity") else ()
        done = hopescale("eval", model, "--tasks", names, *where, "--out", out, *args)
        assert done.code == 0, done.err
        return json.loads(out.read_text())

    return run


def test_a_checkpoint_and_its_export_give_the_same_numbers(evaluate, trained: Path, exported: Path):
    of_run, of_export = evaluate(trained), evaluate(exported)
    assert of_run["results"] == of_export["results"]
    assert of_run["weights"] == of_export["weights"] and of_run["step"] == of_export["step"] == 8
    results = of_run["results"]
    assert set(results) == {"choice", "rolling", "writing"}
    assert results["choice"]["samples"] == 9 and results["choice"]["version"] == "2.0"
    assert set(results["choice"]["metrics"]) == set(results["choice"]["stderr"]) == {"acc", "acc_norm"}
    assert 1 < results["rolling"]["metrics"]["byte_perplexity"] < 300


@torch.no_grad()
def test_the_export_gives_these_numbers_by_its_own_code_too(evaluate, exported: Path, tasks: Path):
    """Read by transformers, and tokenized by the tokenizer that came with it."""
    results = evaluate(exported, "--context", 2000)["results"]
    tokenizer = AutoTokenizer.from_pretrained(exported, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()

    def given(text: str, begin: int) -> float:
        """Return the log-probability of the tokens of a text from the token `begin` on."""
        ids = torch.tensor([tokenizer.encode(text)])
        chosen = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        return float(chosen[begin - 1 :].sum())

    asked, written, right, total, size = [], [], 0, 0.0, 0
    for line in map(json.loads, (tasks / "questions.jsonl").read_text().splitlines()):
        begin = len(tokenizer.encode(line["question"]))
        scores = [given(f"{line['question']} {choice}", begin) for choice in line["choices"]]
        right += scores.index(max(scores)) == line["answer"]
        total, size = total + given(line["text"], 1), size + len(line["text"].encode())
        ids = torch.tensor([tokenizer.encode(line["question"])])
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
        new = tokenizer.decode(model.generate(ids, **options)[0, ids.shape[1] :], skip_special_tokens=True)
        written.append(new.partition("e")[0])
        asked.append(line["question"])
    assert results["choice"]["metrics"]["acc"] == pytest.approx(right / 9)
    assert results["rolling"]["metrics"]["bits_per_byte"] == pytest.approx(-total / size / math.log(2), rel=1e-5)
    said = []
    ours = EvaluatedModel(load_export(exported, torch.device("cpu")), Mesh.alone().control, None, said.append)
    ask = {"until": ["e"], "max_gen_toks": 6}
    requests = [Instance("generate_until", {}, (text, ask), number) for number, text in enumerate(asked)]
    assert ours.generate_until(requests) == written and len(set(written)) > 1
    assert said[-1] == "written 9 of 9 texts"


def test_numbers_do_not_depend_on_the_number_of_ranks(evaluate, trained: Path, tasks: Path, tmp_path: Path):
    out, names = tmp_path / "ranks.json", f"{TASKS},perplexity"
    command = ["eval", trained, "--tasks", names, "--task-path", tasks, "--out", out, "--nproc", 2]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "hopescale", *map(str, command)]
    done = subprocess.run(words, env=environ, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text())["results"] == evaluate(trained, names=names)["results"]
    assert done.stdout.count("choice") == 1


def test_perplexity_is_what_the_run_has_logged(evaluate, trained: Path, exported: Path, text_data: Path):
    last = [record for record in read_metrics(trained / "metrics.jsonl") if "val/text/loss" in record][-1]
    assert last["step"] == 8
    for model, *data in ((trained,), (exported,), (trained, "--data", text_data / "data")):
        (found,) = evaluate(model, *data, names="" if data else "perplexity")["results"].values()
        assert found["metrics"]["loss"] == last["val/text/loss"]
        assert found["metrics"]["bits_per_byte"] == last["val/text/bits_per_byte"]


def test_results_lie_in_the_run_with_what_they_were_measured_on(hopescale, trained: Path, tasks: Path):
    args = ("--tasks", "choice=2,perplexity", "--task-path", tasks, "--limit", 4)
    files = []
    for _ in range(2):
        done = hopescale("eval", trained / "checkpoints" / "step-00000008", *args)
        assert done.code == 0, done.err
        files.append(Path(done.out.splitlines()[-1].removeprefix("written to ")))
    assert [file.name for file in files] == ["step-00000008.1.json", "step-00000008.2.json"]
    assert {file.parent for file in files} == {trained / "evals"} and files[0].read_text() == files[1].read_text()
    body = json.loads(files[0].read_text())
    results = body["results"]
    assert results["choice"]["shots"] == 2 and results["choice"]["samples"] == 4
    attention = trained.name == "attention"
    settings = {"limit": 4, "context": 32 if attention else None, "data": None, "task_path": str(tasks)}
    assert body["settings"] == settings
    assert body["config"]["model"]["vocab_size"] == 300 and set(body["versions"]) == {"hopescale", "torch", "lm_eval"}
    lines = done.out.splitlines()
    assert lines[0].split() == ["task", "version", "shots", "samples", "metric", "value", "stderr"]
    assert lines[1].split()[:5] == ["choice", "2.0", "2", "4", "acc"]
    assert f"{results['perplexity/text']['metrics']['loss']:.4f}" in done.out


@pytest.fixture
def refused(hopescale, tasks: Path) -> Callable[..., None]:
    def run(model: Path, *args: object, code: int, said: tuple[str, ...]) -> None:
        done = hopescale("eval", model, *args)
        assert (done.code, done.out) == (code, "") and all(text in done.err for text in said), done.err

    return run


@pytest.mark.parametrize("trained", ["self_modifying"], indirect=True)
def test_what_cannot_be_asked_is_refused(refused, hopescale, trained: Path, tasks: Path, tmp_path: Path, run, train):
    here = ("--task-path", tasks)
    refused(trained, code=2, said=("nothing to evaluate", "perplexity"))
    refused(trained, "--tasks", "choice=many", *here, code=2, said=("'choice=many'", "NAME=5"))
    refused(trained, "--tasks", "perplexity", "--limit", 2, code=2, said=("--limit", "no effect"))
    refused(trained, "--tasks", "choice", "--task-path", tmp_path / "no", code=2, said=("is no folder",))
    refused(trained, "--tasks", "writing", *here, "--context", 6, code=2, said=("writes 6 tokens, but only 6",))
    refused(tmp_path, "--tasks", "perplexity", code=4, said=("holds no checkpoint",))
    (tmp_path / "there.json").touch()
    there = ("--out", tmp_path / "there.json")
    refused(trained, "--tasks", "perplexity", *there, code=4, said=("already exists",))
    refused(trained, "--data", tasks, code=3, said=(str(tasks),))
    broken = shutil.copytree(tasks, tmp_path / "broken")
    (broken / "choice.yaml").write_text((tasks / "choice.yaml").read_text().replace("questions", "nowhere"))
    refused(trained, "--tasks", "choice", "--task-path", broken, code=3, said=("task choice cannot be loaded",))
    odd = (tasks / "writing.yaml").read_text().replace("max_gen_toks", "num_beams: 2, max_gen_toks")
    (broken / "writing.yaml").write_text(odd)
    refused(trained, "--tasks", "writing", "--task-path", broken, code=2, said=("num_beams", "not known"))
    assert train("train.steps=2").code == 0
    refused(run.path, "--tasks", "choice", *here, code=2, said=("has no tokenizer", "--tasks perplexity"))
    assert hopescale("eval", run.path, "--tasks", "perplexity").code == 0


@pytest.mark.parametrize("trained", ["self_modifying"], indirect=True)
def test_a_damaged_or_foreign_export_is_refused(refused, exported: Path, tmp_path: Path):
    folder = shutil.copytree(exported, tmp_path / "copy")
    (weights,) = folder.glob("*.safetensors")
    os.truncate(weights, 1000)
    refused(folder, "--tasks", "perplexity", code=4, said=(f"{weights.name} has 1000 bytes, the manifest says",))
    (folder / "hopescale.json").unlink()
    refused(folder, "--tasks", "perplexity", code=4, said=("was not written by `convert to-hf`",))
