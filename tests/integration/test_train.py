"""`hopescale train` as a user runs it: what it leaves behind and what it refuses."""

from __future__ import annotations

import gzip
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hopescale.common.paths import shipped_folder
from hopescale.config.load import load_recipe, load_resolved
from hopescale.observe.metrics import read_metrics
from hopescale.train.folder import RunFolder

if TYPE_CHECKING:
    from conftest import Run


def test_the_debug_recipe_leaves_a_run_folder(hopescale, run: Run):
    """The recipe as it is, but short."""
    args = ("train.steps=6", "log.every=3", "checkpoint.every=4")
    done = hopescale("train", "debug", *args, "--run-dir", run.path)
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert re.fullmatch(rf"debug: [\d,]+ parameters on (cpu|cuda), run folder {re.escape(str(run.path))}", lines[0])
    assert re.fullmatch(
        r"parameter groups: decay \d+ \(\d+k\), no_decay \d+ \([\d.]+k\); listed in .*groups\.txt", lines[1]
    )
    code = r"(cpp|triton|torch), (all chunks of a sequence in one operation|chunk after chunk)"
    assert re.fullmatch(rf"memories: {code}( \(.*\))?", lines[2])
    assert lines.pop(3) == "note: level slow is due once up to train.steps=6, at step 4"
    assert re.fullmatch(r"step 0/6  val/markov  loss 4\.\d{4}", lines[3])
    step = r"loss \d\.\d{4}  grad \d\.\d\d  lr \d\.\de-\d  mem [\d.]+[MG]iB  tps [\d,]+(  mfu [\d.]+%)?  eta \w+"
    assert re.fullmatch(rf"step 3/6  {step}  due fast", lines[4])
    assert re.fullmatch(rf"step 6/6  {step}  due fast,mid", lines[5])
    assert lines[6].startswith("step 6/6  val/markov  loss ") and lines[7:] == ["done: step 6 of 6"]
    assert {path.name for path in run.path.iterdir()} == {
        ".lock",
        "checkpoints",
        "config.yaml",
        "env.txt",
        "groups.txt",
        "metrics.jsonl",
        "origins.json",
        "outcome",
        "overrides.txt",
        "plan.json",
        "tb",
    }
    assert (run.path / "overrides.txt").read_text().splitlines() == list(args)
    assert json.loads((run.path / "origins.json").read_text())["train.steps"] == "command line"
    assert json.loads((run.path / "plan.json").read_text())["grad_accumulation"] == 2
    assert "no_decay" in (run.path / "groups.txt").read_text() and "torch 2." in (run.path / "env.txt").read_text()
    assert load_resolved(run.path / "config.yaml") == load_recipe("debug", args).config
    assert len(list((run.path / "tb").glob("events*"))) == 1


def test_the_record_of_a_run(whole):
    records = read_metrics(whole().path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(11))
    assert [record["tokens_seen"] for record in records] == [64 * step for step in range(11)]
    assert [record["step"] for record in records if "val/markov/loss" in record] == [0, 4, 8, 10]
    assert abs(records[0]["val/markov/loss"] - math.log(32)) < 0.1 and "loss" not in records[0]
    for record in records[1:]:
        step = record["step"]
        due = {level for level, period in (("fast", 1), ("mid", 2), ("slow", 4)) if step % period == 0}
        assert {name.split("/")[1] for name in record if name.startswith("level/")} == due
        assert record["level/fast/updates"] == step and record["level/fast/update_rms"] > 0
        assert record["memory/0/eta_mean"] == pytest.approx(0.1, abs=0.01)
        assert record["tps"] > 0 and record["time/step_s"] >= record["time/data_s"]
    assert records[8]["level/slow/updates"] == 2 and records[8]["level/mid/updates"] == 4
    assert records[2]["lr/decay"] == pytest.approx(3e-3) and records[10]["lr/decay"] == pytest.approx(3e-4)


def test_validation_can_be_left_out(train, run: Run):
    done = train("train.validation.every=null", "train.steps=4")
    assert done.code == 0 and "val/" not in done.out
    assert not any(name.startswith("val/") for record in run.values() for name in record)


def test_a_start_says_that_it_compiles_kernels(train, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hopescale.train.worker.mixers_with_kernels", lambda config, device: ["hope"])
    done = train("train.steps=1", "train.validation.every=null")
    assert done.out.startswith("the start compiles the kernels of hope: minutes, if Triton's cache lacks them\n")


def test_old_checkpoints_are_removed_but_those_to_be_kept(train, run: Run):
    assert train("checkpoint.every=1", "checkpoint.keep_last=2", "checkpoint.keep_every=4").code == 0
    assert run.steps() == [4, 8, 9, 10]


def test_without_a_period_the_end_alone_is_saved(train, run: Run):
    assert train("checkpoint.every=null", "train.steps=4").code == 0
    assert run.steps() == [4]


def test_saving_in_the_background_changes_nothing(train, run: Run, whole):
    assert train("checkpoint.async_save=false", "checkpoint.every=3").code == 0
    run.assert_same(whole())


def test_two_processes_do_not_share_a_run_folder(train, run: Run, five: Run):
    before = five.content()
    with RunFolder(five.path):
        done = train()
    assert done.code == 5 and f"run folder {five.path} is in use by another process" in done.err
    assert five.content() == before
    assert train("--stop-at", 6).code == 0


def test_resume_never_and_must(train, run: Run):
    missing = train("--resume", "must")
    assert missing.code == 4 and "--resume must, but " in missing.err and "holds no checkpoint" in missing.err
    assert train("--resume", "never", "--stop-at", 2).code == 0
    again = train("--resume", "never", "--stop-at", 4)
    assert again.code == 4 and "already holds step-00000002" in again.err
    assert run.steps() == [2]


@pytest.mark.parametrize("name", ["nowhere", "run/checkpoints/step-00000003"])
def test_resume_from_a_checkpoint_that_is_not_there(train, five: Run, tmp_path: Path, name: str):
    done = train("--resume", tmp_path / name)
    assert done.code == 4 and str(tmp_path / name) in done.err and "hint: " in done.err


def test_changes_of_identity_are_refused_all_at_once(train, run: Run, five: Run):
    before = five.content("checkpoints"), (five.path / "config.yaml").read_bytes(), five.values()
    changes = ("model.cms.levels.slow.update_every_steps=5", "data.seed=4", "train.seed=1", "train.seq_len=32")
    done = train(*changes, "optim.lr=1e-3")
    assert done.code == 2 and done.err.startswith("config error (4 problems)")
    for change in changes:
        key, _, value = change.partition("=")
        assert re.search(rf"{re.escape(key)}: is \d+ in the run folder, now {value}: a run cannot change it", done.err)
    assert "optim.lr" not in done.err
    assert (five.content("checkpoints"), (five.path / "config.yaml").read_bytes(), five.values()) == before


def test_other_changes_are_shown_and_taken(train, five: Run):
    done = train("optim.lr=1e-3", "train.steps=12", "log.every=2")
    assert done.code == 0
    shown = done.out[done.out.index("changed since the checkpoint:\n") : done.out.index("resumed from")].splitlines()[
        1:
    ]
    assert sorted(shown) == ["log.every: 1 -> 2", "optim.lr: 0.003 -> 0.001", "train.steps: 10 -> 12"]
    assert five.latest().name == "step-00000012"
    assert "lr: 0.001" in (five.path / "config.yaml").read_text()


def test_a_change_of_precision_is_refused(train, run: Run, five: Run):
    done = train("train.precision=bf16")
    assert done.code == 4 and "does not fit this run" in done.err and "train.precision" in done.err


def test_a_run_cannot_end_before_it_stands(train, five: Run):
    done = train("--stop-at", 3)
    assert done.code == 2 and "--stop-at is 3, but " in done.err and "is already at step 5" in done.err
    done = train("train.steps=4")
    assert done.code == 2 and "is at step 5, beyond train.steps=4" in done.err
    assert train("--stop-at", 5).code == 0
    assert five.steps() == [4, 5]


@pytest.mark.parametrize("step", [0, -1, 11])
def test_a_stop_outside_of_the_run_is_refused(train, run: Run, step: int):
    done = train("--stop-at", step)
    assert done.code == 2 and f"--stop-at is {step}, but the run has steps 1 to 10" in done.err
    assert not run.path.exists()


def test_a_damaged_checkpoint_is_refused_and_an_earlier_one_named(train, five: Run):
    file = five.checkpoint(5) / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = train()
    assert done.code == 4 and "step-00000005 is damaged: __0_0.distcp" in done.err
    assert f"--resume {five.checkpoint(4)}" in done.err
    assert train("--resume", five.checkpoint(4), "--stop-at", 6).code == 0


def test_a_run_longer_than_its_data_is_refused_before_it_starts(train, run: Run):
    done = train("data.sources.markov.synthetic.num_samples=39")
    assert done.code == 2 and "the run reads 40 sequences of it" in done.err and "data.max_epochs=2" in done.err
    assert not (run.path / "checkpoints").exists()


def test_a_parameter_in_two_groups_is_refused(train):
    done = train("optim.groups.embed.match=['*embedding*','blocks.0.norm.*']")
    assert done.code == 2 and "parameter blocks.0.norm.weight matches no_decay and embed" in done.err


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_run_folder_that_cannot_be_made(hopescale, tiny, run: Run, tmp_path: Path, place: str):
    (tmp_path / "file").write_text("precious")
    done = hopescale("train", "debug", *tiny, "--run-dir", tmp_path / place)
    assert done.code == 5 and f"cannot write the run folder {tmp_path / place}" in done.err
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("ranks", [(), ("--nproc", 2)])
@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_user_s_files_are_not_replaced(hopescale, tiny, run: Run, ranks, dry):
    """A recipe called `config.yaml` in the folder that is named as the run's."""
    folder = run.path
    folder.mkdir()
    (folder / "config.yaml").write_text(f"# mine\nbase: {shipped_folder('recipes') / 'debug.yaml'}\n")
    for name in ("metrics.jsonl", "env.txt"):
        (folder / name).write_text("precious")
    before = run.content()
    done = hopescale("train", folder / "config.yaml", *tiny, "--run-dir", folder, *ranks, *dry)
    assert done.code == 5 and f"{folder} is not empty and not a folder of hopescale's" in done.err
    assert "config.yaml, env.txt, metrics.jsonl could be replaced" in done.err
    assert run.content() == before


def test_a_run_that_ended_before_it_began_may_begin_again(train, run: Run):
    run.path.mkdir()
    (run.path / ".lock").write_text("")
    assert train("--stop-at", 1).code == 0
    (run.path / "notes.txt").write_text("mine")
    assert train("--stop-at", 2).code == 0
    assert (run.path / "notes.txt").read_text() == "mine"


def test_a_dry_run_shows_the_plan_and_touches_nothing(tiny, tmp_path: Path, run: Run):
    command = [sys.executable, "-m", "hopescale", "train", "debug", *tiny, "--dry-run", "--run-dir", "there"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ") for line in done.stdout.splitlines())
    assert lines["run_dir"] == "there" and lines["grad_accumulation"] == "2" and lines["total_tokens"] == "640"
    assert int(lines["parameters/total"].replace(",", "")) > 0
    assert not list(tmp_path.iterdir())


@pytest.fixture
def on_text(train, text_data: Path, tmp_path: Path) -> Callable:
    """Train on a copy of the prepared text."""
    shutil.copytree(text_data / "data", tmp_path / "data")
    source = (f"data.sources.text.path={tmp_path / 'data'}", "data.sources.markov=null", "model.vocab_size=300")
    return partial(train, *source)


def test_a_run_on_text_measures_bits_per_byte_and_keeps_the_tokenizer(on_text, run: Run, text_data: Path):
    assert on_text("train.steps=4").code == 0
    last = read_metrics(run.path / "metrics.jsonl")[-1]
    ratio = last["val/text/loss"] / math.log(2) / last["val/text/bits_per_byte"]
    assert 1 < ratio < 8
    tokenizer = (text_data / "tok" / "tokenizer.model").read_bytes()
    assert (run.checkpoint(4) / "tokenizer.model").read_bytes() == tokenizer


def test_other_data_under_the_same_path_is_refused(on_text, run: Run, hopescale, text_data: Path, tmp_path: Path):
    assert on_text("--stop-at", 5).code == 0
    before = run.content("checkpoints")
    shutil.rmtree(tmp_path / "data")
    made = ("--out", tmp_path / "data", "--tokenizer", text_data / "tok", "--validation", 0.1, "--seed", 1)
    assert hopescale("data", "prepare", text_data / "text", *made).code == 0
    done = on_text()
    assert done.code == 4 and "the data is not what" in done.err and "step-00000005 was trained on" in done.err
    assert run.content("checkpoints") == before


def test_the_same_data_may_lie_elsewhere(on_text, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A moved folder, a relative path and one below `~` are the data set that the run began with."""
    assert on_text("--stop-at", 1).code == 0
    (tmp_path / "data").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for step, path in enumerate(("moved", tmp_path / "moved", "~/moved"), 2):
        done = on_text(f"data.sources.text.path={path}", "--stop-at", step)
        assert done.code == 0 and "data.sources.text.path: " in done.out, done.err
    assert run.steps()[-1] == 4


def test_other_data_elsewhere_is_refused(on_text, hopescale, text_data: Path, tmp_path: Path):
    assert on_text("--stop-at", 1).code == 0
    made = ("--out", tmp_path / "other", "--tokenizer", text_data / "tok", "--validation", 0.1, "--seed", 1)
    assert hopescale("data", "prepare", text_data / "text", *made).code == 0
    done = on_text(f"data.sources.text.path={tmp_path / 'other'}")
    assert done.code == 4 and re.search(
        r"its fingerprint is \w{12}, not \w{12} \(data.sources.text.path: .* -> ", done.err
    )


def test_a_relative_path_is_told_with_what_it_is_relative_to(on_text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = on_text("data.sources.text.path=data")
    assert done.code == 3 and "cannot read data/index.json: No such file or directory (from the working" in done.err
    assert f"directory, {tmp_path / 'here'})" in done.err


def test_a_source_of_which_nothing_is_held_out_is_named(on_text, hopescale, text_data: Path, tmp_path: Path):
    shutil.rmtree(tmp_path / "data")
    made = ("--out", tmp_path / "data", "--tokenizer", text_data / "tok", "--validation", 0)
    assert hopescale("data", "prepare", text_data / "text", *made).code == 0
    done = on_text("--stop-at", 1)
    assert done.code == 0 and "note: nothing is held out of text: there is no validation loss of it" in done.out


def test_missing_data_is_one_message(on_text, run: Run, tmp_path: Path):
    shutil.rmtree(tmp_path / "data")
    done = on_text()
    assert done.code == 3 and f"{tmp_path / 'data'}" in done.err
    assert not (run.path / "checkpoints").exists()


def test_a_wrong_vocabulary_is_one_message(on_text):
    done = on_text("model.vocab_size=301")
    assert done.code == 2 and "model.vocab_size: is 301, but the tokenizer of" in done.err


def test_a_profile_is_written_beside_the_run(train, run: Run):
    done = train("--profile", 2, "log.trackers=[]")
    assert done.code == 0 and f"profile of the last 2 steps: {run.path / 'profile'}" in done.out
    (trace,) = (run.path / "profile").glob("trace-4.json.gz")
    with gzip.open(trace) as file:
        assert json.load(file)["traceEvents"]
    assert "Self CPU" in (run.path / "profile" / "operations-4.txt").read_text()


def test_a_run_too_short_for_a_profile_says_so(train, run: Run):
    done = train("--profile", 2, "--stop-at", 2)
    assert done.code == 0 and "--profile wrote nothing" in done.out
    assert not (run.path / "profile").exists()
