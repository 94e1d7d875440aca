from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree

import fsspec
import pytest

from hopescale.checkpoint.manifest import Manifest, to_json
from hopescale.cli.app import main
from hopescale.common.object_store import ObjectStore
from hopescale.config.load import load_recipe, to_dict
from hopescale.launch.ledger import copied_from, entries, submitting
from hopescale.train.folder import RunFolder
from tests.support.fake_slurm import FakeSlurm, record

PARTITIONS = "cpu*|3|(null)|1:00:00\ngpu|2|gpu:4(S:0-1)|infinite\ngpu|1|gpu:h100:6(S:0,1),gpu:1g.5gb:2,nvme:1|infinite"
PROFILE = 'gpus_per_node: 0\nranks_per_node: 2\ntime: "10"\n'


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch) -> FakeSlurm:
    """A cluster that takes every job, with three nodes of two partitions; the working directory has a profile."""
    (tmp_path / "bin").mkdir()
    fake = FakeSlurm(tmp_path / "bin")
    fake.answer("sbatch", "4219;cluster")
    fake.answer("sinfo", PARTITIONS)
    fake.answer("sacct", error="Slurm accounting storage is disabled", code=1)
    fake.answer("scontrol", error="slurm_load_jobs error: Invalid job id specified", code=1)
    monkeypatch.setenv("PATH", f"{fake.folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(PROFILE)
    return fake


@pytest.fixture
def submit(capsys):
    """Run `hopescale submit debug ARGS --cluster mine.yaml`."""

    def run(*args: str, profile: str = "mine.yaml") -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["submit", "debug", *args, "--cluster", profile])
        return caught.value.code or 0, *capsys.readouterr()

    return run


def profile(text: str) -> str:
    Path("other.yaml").write_text(text)
    return "other.yaml"


def content(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_job_is_submitted_with_all_it_needs(slurm: FakeSlurm, submit, tmp_path: Path):
    code, out, err = submit("--nodes", "2", "train.steps=7", "parallel.tp=2")
    assert (code, out, err) == (0, "job 4219, log runs/debug/logs/4219.log\n", "")
    run = tmp_path / "runs" / "debug"
    named = {"config.yaml", "overrides.txt", "origins.json", "plan.json", "env.txt", "code", "logs", "jobs.jsonl"}
    assert content(run) == named | {"submit.sbatch", ".submit"}
    assert slurm.calls("sbatch") == [f"--parsable {run}/submit.sbatch"]
    (line,) = map(json.loads, (run / "jobs.jsonl").read_text().splitlines())
    assert line.pop("submitted").startswith("20")
    log = str(run / "logs" / "4219.log")
    expected = {
        "job": "4219",
        "cluster": "mine",
        "nodes": 2,
        "ranks": 4,
        "script": "submit.sbatch",
        "log": log,
        "folder": str(run),
        "inode": run.stat().st_ino,
    }
    assert line == expected
    script = (run / "submit.sbatch").read_text()
    for text in (
        f"--chdir={tmp_path}\n",
        "--nodes=2\n",
        "--ntasks-per-node=2\n",
        "--time=10\n",
        f"({sys.executable} -u)",
    ):
        assert text in script
    assert load_recipe(run / "config.yaml").config == load_recipe("debug", ["train.steps=7", "parallel.tp=2"]).config
    assert json.loads((run / "plan.json").read_text())["dp"] == 2
    assert (run / "overrides.txt").read_text() == "train.steps=7\nparallel.tp=2\n"


def test_the_copy_of_the_code_is_what_a_job_runs(slurm: FakeSlurm, submit, tmp_path: Path):
    submit()
    run = tmp_path / "runs" / "debug"
    (tmp_path / "hopescale").mkdir()  # the working directory may be a checkout
    (tmp_path / "hopescale" / "__init__.py").write_text("")
    (tmp_path / "ask.py").write_text(
        "import hopescale, hopescale.common.software as s, hopescale.config.load as l\n"
        "print(hopescale.__file__, l.load_recipe('debug').config.name, s.source_revision())"
    )
    exports = [line for line in (run / "submit.sbatch").read_text().splitlines() if line.startswith("export ")]
    ask = f'{sys.executable} -c "$(cat ask.py)"'
    script = "\n".join([f"run='{run}'", *exports, ask])
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    file, name, revision = done.stdout.strip().split(" ", 2)
    assert file == str(run / "code" / "hopescale" / "__init__.py") and name == "debug"
    assert revision == (run / "code" / "revision.txt").read_text().strip()
    assert ("with local changes" in revision) >= (run / "code" / "changes.diff").exists()


def test_a_second_submission_forgets_how_the_first_ended(slurm: FakeSlurm, submit, tmp_path: Path):
    submit()
    run = tmp_path / "runs" / "debug"
    (run / "outcome").write_text("gave up: exit code 3\n")
    (run / "failures").write_text("none exit code 3\n")
    (run / "bad_nodes").write_text("n1\n")
    assert submit("train.steps=300")[0] == 0
    assert {"outcome", "failures"}.isdisjoint(content(run)) and "bad_nodes" in content(run)
    assert len((run / "jobs.jsonl").read_text().splitlines()) == 2
    assert "steps: 300" in (run / "config.yaml").read_text()


def test_jobs_of_a_chain_wait_for_one_another(slurm: FakeSlurm, submit, tmp_path: Path):
    code, out, _ = submit("--chain", "3")
    assert code == 0 and out.count("job 4219, log ") == 3
    script = tmp_path / "runs" / "debug" / "submit.sbatch"
    waits = f"--parsable --dependency=afterany:4219 {script}"
    assert slurm.calls("sbatch") == [f"--parsable {script}", waits, waits]
    assert "#SBATCH --no-requeue" in script.read_text()


def test_a_dry_run_writes_nothing_and_says_when_the_job_would_start(slurm: FakeSlurm, submit, tmp_path: Path):
    slurm.answer("sbatch", error="sbatch: Job 9 to start at 2026-11-22T05:10:46 using 2 processors on nodes n1")
    code, out, err = submit("--dry-run")
    assert code == 0 and out.startswith("#!/bin/bash\n")
    assert err == "not submitted; expected to start at 2026-11-22T05:10:46 using 2 processors on nodes n1\n"
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_needs_neither_slurm_nor_torch(tmp_path: Path):
    script = """
import sys
sys.modules["torch"] = None
from hopescale.cli.app import main
main(["submit", "debug", "--cluster", "test", "--dry-run"])
"""
    environ = {"PATH": "/nowhere", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/bin/bash\n")
    assert done.stderr == "not submitted; when it would start is not known: there is no command sbatch here\n"


@pytest.mark.parametrize(
    ("text", "args", "message"),
    [
        (
            "partition: gpus\n" + PROFILE,
            [],
            "gpus is not on this cluster   [profile other]\n    hint: the cluster has cpu",
        ),
        ("gpus_per_node: 1\n", [], "gpus_per_node: 1, but nodes of partition cpu have 0"),
        ("partition: gpu\ngpus_per_node: 16\n", ["train.global_batch_tokens=8Ki"], "nodes of partition gpu have 8"),
        (PROFILE, ["--nodes", "4", "train.micro_batch_size=1"], "--nodes: 4, but partition cpu has 3"),
        (PROFILE, ["--nodes", "2", "parallel.pp=3", "model.num_layers=3"], "does not divide 4"),
        (PROFILE, ["--time", "3"], "3 is 180 s, but the run is told to stop signal_lead_s=180 s before its end"),
        (PROFILE, ["--time", "soon"], "'soon' is no time limit"),
        (PROFILE, ["--time", "1:00:01"], "1:00:01, but the most that partition cpu allows is 1:00:00"),
        (
            PROFILE + "account: YOUR_ACCOUNT\n",
            [],
            f"account: YOUR_ACCOUNT is a placeholder   [other.yaml, line {PROFILE.count(chr(10)) + 1}]",
        ),
    ],
)
def test_what_the_cluster_cannot_run_is_refused(slurm: FakeSlurm, submit, text, args, message):
    code, _, err = submit(*args, profile=profile(text))
    assert code == 2 and message in err
    assert not Path("runs").exists() and slurm.calls("sbatch") == []


def test_one_of_several_partitions_is_enough(slurm: FakeSlurm, submit):
    args = ("train.global_batch_tokens=8Ki", "--dry-run")
    assert submit(*args, profile=profile("partition: cpu,gpu\ngpus_per_node: 8\n"))[0] == 0
    assert slurm.calls("sinfo")[0].startswith("--all ")  # hidden ones too
    code, _, err = submit(*args, profile=profile("partition: cpu,tpu\ngpus_per_node: 8\n"))
    assert code == 2 and "tpu is not on this cluster" in err


def test_data_that_is_not_there_is_refused_unless_only_nodes_see_it(slurm: FakeSlurm, submit):
    nowhere = ("data.sources.markov=null", "data.sources.main.path=nowhere")
    code, _, err = submit(*nowhere)
    assert code == 3 and "nowhere" in err and slurm.calls("sbatch") == []
    assert submit(*nowhere, "--skip-data-check")[0] == 0


def test_a_cache_on_the_nodes_needs_no_folder_here(slurm: FakeSlurm, submit, monkeypatch):
    monkeypatch.delenv("TMPDIR", raising=False)
    ObjectStore("memory://submitted").write("index.json", b"{}")
    args = ("data.sources.markov=null", "data.sources.main.path=memory://submitted", "data.cache=$TMPDIR/shards")
    code, _, err = submit(*args)
    assert code == 3 and "TMPDIR" not in err and "index" in err, "what is wrong is the data"
    fsspec.filesystem("memory").rm("/submitted", recursive=True)


def test_what_does_not_fit_the_gpus_is_refused(slurm: FakeSlurm, submit):
    large = ("model.d_model=16384", "model.num_layers=64", "train.global_batch_tokens=8Ki")
    code, _, err = submit(*large, profile=profile("partition: gpu\ngpus_per_node: 4\ngpu_type: a100\n"))
    assert code == 2 and "by its plan, but one A100 has" in err and slurm.calls("sbatch") == []


def test_the_longest_limit_of_several_partitions_counts(slurm: FakeSlurm, submit):
    args = ("train.global_batch_tokens=8Ki", "--dry-run", "--time", "2:00:00")
    assert submit(*args, profile=profile("partition: cpu,gpu\ngpus_per_node: 8\n"))[0] == 0


def test_one_of_two_that_submit_a_run_at_once_is_refused(slurm: FakeSlurm, submit, tmp_path: Path):
    run = tmp_path / "runs" / "debug"
    with submitting(run):
        (run / "logs").mkdir()  # half written: not yet a folder of hopescale's
        code, _, err = submit()
        assert code == 5 and "another process is submitting" in err and slurm.calls("sbatch") == []
        assert content(run) == {".submit", "logs"}
        (run / "logs").rmdir()
    assert submit()[0] == 0


def test_a_copy_of_a_run_has_no_jobs_of_its_own(slurm: FakeSlurm, submit, tmp_path: Path):
    submit()
    runs = tmp_path / "runs"
    copytree(runs / "debug", runs / "copy")
    slurm.answer("scontrol", record("4219", "RUNNING"))
    assert [entry.job for entry in entries(runs / "debug")] == ["4219"]
    assert entries(runs / "copy") == [] and copied_from(runs / "copy") == str(runs / "debug")
    assert submit("--run-dir", "runs/copy")[0] == 0
    assert [len(entries(runs / name)) for name in ("debug", "copy")] == [1, 1]
    (runs / "copy").rename(runs / "moved")
    assert len(entries(runs / "moved")) == 1
    (runs / "same").symlink_to(runs / "debug")
    assert len(entries(runs / "same")) == 1
    copytree(runs / "debug", runs / "late")
    (runs / "debug").rename(runs / "away")
    assert len(entries(runs / "away")) == 1 and entries(runs / "late") == []


def test_a_line_of_an_older_version_names_no_number_of_its_folder(slurm: FakeSlurm, submit, tmp_path: Path):
    submit()
    runs = tmp_path / "runs"
    line = json.loads((runs / "debug" / "jobs.jsonl").read_text())
    (runs / "debug" / "jobs.jsonl").write_text(json.dumps({k: v for k, v in line.items() if k != "inode"}) + "\n")
    copytree(runs / "debug", runs / "copy")
    assert len(entries(runs / "debug")) == 1 and entries(runs / "copy") == []
    (runs / "debug").rename(runs / "moved")
    assert len(entries(runs / "moved")) == 1


def test_a_cluster_that_cannot_be_asked_is_not_asked(slurm: FakeSlurm, submit):
    slurm.answer("sinfo", error="slurm_load_partitions: Unable to contact slurm controller", code=1)
    assert submit(profile=profile("partition: gpus\n" + PROFILE))[0] == 0


def test_a_folder_in_use_is_refused(slurm: FakeSlurm, submit, tmp_path: Path):
    submit()
    slurm.answer("scontrol", record("4219", "PENDING"))
    code, _, err = submit()
    assert code == 5 and "runs/debug is in use by job 4219, pending" in err
    slurm.answer("scontrol", record("4219", "COMPLETED"))
    with RunFolder(tmp_path / "runs" / "debug"):
        code, _, err = submit()
        assert code == 5 and "runs/debug is in use by another process" in err
    assert submit()[0] == 0


def test_a_folder_of_another_run_is_refused(slurm: FakeSlurm, submit):
    submit()
    (Path("runs/debug/checkpoints")).mkdir()
    Path("runs/debug/checkpoints/latest").write_text("step-00000002\n")
    assert submit("train.steps=300")[0] == 0
    code, _, err = submit("model.d_model=32")
    assert code == 2 and "model.d_model: is 64 in the run folder, now 32" in err
    assert len(slurm.calls("sbatch")) == 2


def test_a_folder_that_cannot_be_made_is_refused(slurm: FakeSlurm, submit):
    Path("file").write_text("")
    code, _, err = submit("--run-dir", "file/run")
    assert code == 5 and "file is a file" in err and slurm.calls("sbatch") == []


def test_a_user_s_files_are_not_replaced(slurm: FakeSlurm, submit, tmp_path: Path):
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "config.yaml").write_text("precious")
    code, _, err = submit("--run-dir", "exp")
    assert code == 5 and "exp is not empty and not a folder of hopescale's: config.yaml could be replaced" in err
    assert content(tmp_path / "exp") == {"config.yaml"} and slurm.calls("sbatch") == []


def test_what_sbatch_refuses_is_told(slurm: FakeSlurm, submit):
    slurm.answer("sbatch", error="sbatch: error: Batch job submission failed: Invalid qos specification", code=1)
    code, out, err = submit()
    assert (code, out) == (5, "") and "Invalid qos specification" in err
    assert not Path("runs/debug/jobs.jsonl").exists()


def test_a_micro_batch_by_itself_is_left_to_the_start_and_said_for_the_profiles_gpus(slurm: FakeSlurm, submit):
    gpus = profile('gpus_per_node: 2\ngpu_type: h100\npartition: gpu\ntime: "10"\n')
    for size, more in ((4, ()), (8, ("train.global_batch_tokens=2Ki",)), (1, ("train.global_batch_tokens=256",))):
        code, _, err = submit("train.micro_batch_size=auto", *more, "--nodes", "1", profile=gpus)
        assert (code, err) == (0, f"train.micro_batch_size: {size} is expected on H100; the start decides\n")
        assert load_recipe("runs/debug/config.yaml").config.train.micro_batch_size == "auto"
        assert json.loads(Path("runs/debug/plan.json").read_text())["micro_batch_size"] is None
    code, _, err = submit(
        "train.micro_batch_size=auto", "train.seq_len=64Mi", "train.global_batch_tokens=128Mi", profile=gpus
    )
    assert code == 2 and "auto, but none fits: a step of one sequence takes" in err
    code, _, err = submit("train.micro_batch_size=auto")
    assert code == 0 and "auto is chosen on the nodes; the profile names no gpu_type, so that it is not" in err


def test_a_run_that_has_a_checkpoint_is_expected_to_keep_its_micro_batch(slurm: FakeSlurm, submit):
    gpus = profile('gpus_per_node: 2\ngpu_type: h100\npartition: gpu\ntime: "10"\n')
    config = load_recipe("debug", ["train.micro_batch_size=2"]).config
    folder = Path("runs/debug/checkpoints/step-00000001")
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(to_json(Manifest({"step": 1}, to_dict(config), {})))
    (folder.parent / "latest").write_text(f"{folder.name}\n")
    code, _, err = submit("train.micro_batch_size=auto", profile=gpus)
    assert (code, err) == (0, "train.micro_batch_size: 2 is expected on H100, as before; the start decides\n")
