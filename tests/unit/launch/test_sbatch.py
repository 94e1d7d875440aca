"""What the batch script does, run by bash with commands of Slurm that are none; the text itself is golden."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from hopescale.launch.ledger import LedgerEntry, note, now
from hopescale.launch.profile import ClusterProfile
from hopescale.launch.sbatch import Array, BatchJob, render
from tests.support.fake_slurm import CONTROLLER_DOWN, FakeSlurm

DONE = "done at step 9 of 9"
CPUS = ClusterProfile(gpus_per_node=0, ranks_per_node=2, max_failures=2)


@pytest.fixture
def job(tmp_path: Path) -> BatchJob:
    run = tmp_path / "run 100%"
    (run / "checkpoints").mkdir(parents=True)
    return BatchJob("tiny", CPUS, nodes=2, run_dir=run, work_dir=tmp_path, python="python")


@pytest.fixture
def slurm(tmp_path: Path) -> FakeSlurm:
    """Commands of Slurm; `sleep` does not."""
    (tmp_path / "bin").mkdir()
    fake = FakeSlurm(tmp_path / "bin")
    for command in ("srun", "scontrol", "sleep"):
        fake.answer(command)
    return fake


@pytest.fixture
def play(job: BatchJob, slurm: FakeSlurm, tmp_path: Path):
    """Run the script as the n-th start of a job; the ranks end with a code, leaving an outcome and a checkpoint."""

    def run(
        code: int,
        outcome: str = "",
        checkpoint: str = "",
        *,
        start: int = 0,
        job: BatchJob = job,
        error: str = "",
        **more: str,
    ):
        slurm.answer("srun", code=code)
        with (slurm.folder / "srun").open("r+") as script:
            lines = script.read().splitlines()
            script.seek(0)
            if outcome:
                lines.insert(-1, f"echo '{outcome}' > '{job.run_dir}/outcome'")
            if checkpoint:
                lines.insert(-1, f"echo '{checkpoint}' > '{job.run_dir}/checkpoints/latest'")
            script.write("\n".join(lines) + "\n")
        environ = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}
        environ |= more | ({"SLURM_RESTART_COUNT": str(start)} if start else {})
        path = f"{slurm.folder}{os.pathsep}{os.environ['PATH']}"
        options = {"env": {"PATH": path, **environ}, "cwd": tmp_path, "capture_output": True, "text": True}
        done = subprocess.run(["bash", "-s"], input=render(job), check=False, **options)
        assert error in done.stderr if error else done.stderr == ""
        return done.returncode, done.stdout

    return run


def requeued(slurm: FakeSlurm) -> int:
    return slurm.calls("scontrol").count("requeue 7")


def test_ranks_are_started_from_the_copy_of_the_code(job: BatchJob, play, slurm: FakeSlurm):
    assert play(0, "done at step 3 of 3")[0] == 0
    (call,) = slurm.calls("srun")
    assert call.startswith("--export=ALL --label --kill-on-bad-exit=0 --wait=60 python -u -m hopescale train ")
    assert call.endswith(f"{job.run_dir}/config.yaml --run-dir {job.run_dir} --resume auto")
    assert 'export PYTHONPATH="$run/code"' in render(job)
    assert slurm.calls("scontrol") == []


def test_a_run_that_was_told_to_stop_is_requeued(job: BatchJob, play, slurm: FakeSlurm):
    assert play(75)[0] == 75
    assert play(137, "stopped by SIGUSR1 at step 3 of 9")[0] == 75  # a rank was killed after the save
    assert play(138)[0] == 138  # killed by USR1 before python could listen
    assert requeued(slurm) == 3
    assert not (job.run_dir / "failures").exists()


def test_a_requeue_leaves_out_bad_nodes(job: BatchJob, play, slurm: FakeSlurm):
    (job.run_dir / "bad_nodes").write_text("n2\nn1\nn2\n")
    play(75)
    assert slurm.calls("scontrol")[-3:] == ["requeue 7", "show job -o 7", "update JobId=7 ExcNodeList=n1,n2"]
    slurm.answer("scontrol", "JobId=7 ReqNodeList=(null) ExcNodeList=n[5-8] NodeList=n1")
    play(75)
    assert slurm.calls("scontrol")[-1] == "update JobId=7 ExcNodeList=n[5-8],n1,n2"


def test_a_run_that_is_done_is_done_whatever_the_launcher_says(play, slurm: FakeSlurm):
    assert play(143, "done at step 9 of 9")[0] == 0
    code, said = play(1, start=1)
    assert code == 0 and "the run is done" in said
    assert len(slurm.calls("srun")) == 1 and requeued(slurm) == 0


def test_an_old_outcome_does_not_count(job: BatchJob, play, slurm: FakeSlurm):
    (job.run_dir / "outcome").write_text("stopped by SIGTERM at step 3 of 9\n")
    assert play(1)[0] == 1
    assert (job.run_dir / "failures").read_text().startswith("none exit code 1, job 7, ")


def test_a_run_that_diverged_is_not_started_again(job: BatchJob, play, slurm: FakeSlurm):
    assert play(6)[0] == 6
    assert requeued(slurm) == 0
    assert (job.run_dir / "outcome").read_text().startswith("gave up: diverged")


def test_ranks_that_nccl_ends_are_a_failure_like_any_other(job: BatchJob, play, slurm: FakeSlurm):
    assert play(134)[0] == 134  # SIGABRT
    assert requeued(slurm) == 1
    said = "exit code 134, an abort: where a rank is lost or hangs, NCCL ends those that wait for it"
    assert (job.run_dir / "failures").read_text().startswith(f"none {said}, job 7, ")


def test_failures_are_counted_since_the_newest_checkpoint(play, slurm: FakeSlurm):
    play(1)
    play(137, start=1)
    assert requeued(slurm) == 2
    play(1, checkpoint="step-00000010", start=2)  # one more without it would have been too many
    play(1, start=3)
    assert requeued(slurm) == 4
    code, said = play(9, start=4)
    assert code == 9 and "gives up: exit code 9, failure 3 without a newer checkpoint" in said
    assert requeued(slurm) == 4


def test_a_new_submission_has_all_its_tries(play, slurm: FakeSlurm):
    for start in range(3):
        play(1, start=start)
    assert requeued(slurm) == 2
    play(1)
    assert requeued(slurm) == 3


def test_a_requeue_that_is_refused_ends_the_job_with_the_code_of_the_ranks(play, slurm: FakeSlurm):
    slurm.answer("scontrol", error="Requested operation is presently disabled for job 7", code=1)
    code, said = play(1)
    assert code == 1 and "requeue refused: Requested operation is presently disabled" in said
    assert slurm.calls("scontrol") == ["requeue 7"] and slurm.calls("sleep") == []


def test_a_requeue_is_tried_until_the_controller_is_back(play, slurm: FakeSlurm):
    scontrol, calls = slurm.folder / "scontrol", slurm.folder / "scontrol.calls"
    slurm.answer("scontrol", error=CONTROLLER_DOWN, code=1)
    lines = scontrol.read_text().splitlines()
    back = f"[ $(grep -c requeue {calls}) -gt 3 ] && exit 0"
    scontrol.write_text("\n".join([*lines[:2], back, *lines[2:]]) + "\n")
    code, said = play(1)
    assert code == 1 and requeued(slurm) == 4
    assert said.count("requeue not taken, tried again in 10 s: slurm_load_jobs error: Unable to contact") == 3
    assert slurm.calls("sleep") == ["10", "10", "10", "60"]


def test_exit_code_0_without_the_word_of_the_run_is_a_failure(job: BatchJob, play, slurm: FakeSlurm):
    for start, said in enumerate(["", "done", "done at step 3 of 9"]):
        assert play(0, said, start=start)[0] == 1
    assert not job.run_dir.joinpath("outcome").read_text().startswith("done")
    assert (job.run_dir / "failures").read_text().count("exit code 0, but the run does not say that it is done") == 3
    assert requeued(slurm) == 2
    assert play(0, "paused at step 3 of 9")[0] == 0


def test_a_done_run_whose_steps_were_raised_goes_on(job: BatchJob, play, slurm: FakeSlurm):
    recipe = job.run_dir / "config.yaml"
    recipe.write_text("model:\n  steps: 1\ntrain:\n  seq_len: 8\n  steps: 9\nlog:\n  steps: 2\n")
    assert play(0, DONE)[0] == 0 and play(0, DONE)[0] == 0
    assert len(slurm.calls("srun")) == 1
    recipe.write_text("train:\n  steps: 12\n")
    assert play(75, "stopped by SIGUSR1 at step 11 of 12")[0] == 75 and len(slurm.calls("srun")) == 2
    assert play(0, "done at step 12 of 12")[0] == 0 and len(slurm.calls("srun")) == 3


LEAKS = (
    "set -euo pipefail",
    "set -C",
    "IFS=:",
    "trap true EXIT",
    "trap 'exit 0' ERR",
    "rc=0 what=nothing max_failures=0",
    "alias log=true; shopt -s expand_aliases",
    "log() { exit 0; }; newest() { exit 0; }",
    "cd /",
)


@pytest.mark.parametrize("line", LEAKS)
def test_what_a_setup_sets_does_not_leak_into_the_script(job: BatchJob, play, slurm: FakeSlurm, line: str):
    job = replace(job, profile=replace(CPUS, setup=(line, "export FROM_SETUP=1")))
    (job.run_dir / "outcome").write_text("stopped by SIGTERM at step 3 of 9\n")
    assert play(1, job=job)[0] == 1
    assert (job.run_dir / "failures").read_text().startswith("none exit code 1, job 7, ") and requeued(slurm) == 1


@pytest.mark.parametrize("line", [line for line in LEAKS if "cd" not in line])
def test_what_a_bash_env_file_sets_does_not_leak_either(
    job: BatchJob, play, slurm: FakeSlurm, line: str, tmp_path: Path
):
    (tmp_path / "env.sh").write_text(f"{line}\n")
    (job.run_dir / "outcome").write_text("stopped by SIGTERM at step 3 of 9\n")
    assert play(1, BASH_ENV=str(tmp_path / "env.sh"))[0] == 1
    assert (job.run_dir / "failures").read_text().startswith("none exit code 1, job 7, ") and requeued(slurm) == 1


def test_a_setup_that_ends_its_shell_is_a_failure(job: BatchJob, play, slurm: FakeSlurm):
    job = replace(job, profile=replace(CPUS, setup=("set -e", "false")))
    assert play(0, DONE, job=job)[0] == 1
    assert slurm.calls("srun") == [] and requeued(slurm) == 1


def test_nodes_are_checked_and_data_copied_before_the_ranks_start(job: BatchJob, play, slurm: FakeSlurm):
    checked = replace(job, profile=replace(CPUS, preflight="drain"), staged=True)
    play(0, "paused at step 3 of 9", job=checked)
    check, stage, train = slurm.calls("srun")
    assert f"-m hopescale node check {job.run_dir}/config.yaml --run-dir {job.run_dir} --drain" in check
    assert "--ntasks=2 --ntasks-per-node=1 python -u -m hopescale node stage" in stage and " train " in train
    assert play(75, job=checked)[0] == 75 and len(slurm.calls("srun")) == 4 and requeued(slurm) == 1
    warned = replace(job, profile=replace(CPUS, preflight="warn"))
    assert play(0, DONE, job=warned)[0] == 0
    check, train = slurm.calls("srun")[4:]
    assert check.endswith(f"--run-dir {job.run_dir}") and " train " in train


def test_an_element_requeues_itself_and_not_its_array(job: BatchJob, play, slurm: FakeSlurm):
    elements, run = job.run_dir / "elements", job.work_dir / "its run"
    elements.mkdir()
    run.mkdir()
    (elements / "5.sh").write_text(f"run='{run}'\ncommand=(train debug 'name=two words')\n")
    (run / "bad_nodes").write_text("n2\n")
    array = replace(job, array=Array(range(6), 2))
    environ = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "5"}
    assert play(75, job=array, **environ)[0] == 75
    assert slurm.calls("srun")[-1].endswith("python -u -m hopescale train debug name=two words")
    assert slurm.calls("scontrol")[-3:] == ["requeue 7_5", "show job -o 7_5", "update JobId=7_5 ExcNodeList=n2"]
    assert play(1, job=array, **environ)[0] == 1
    assert (run / "failures").read_text().startswith("none exit code 1, job 7_5, ")
    assert play(0, job=array, **environ)[0] == 1 and not (run / "outcome").exists()
    assert "#SBATCH --array=0-5%2\n" in render(array) and "--array=0-5\n" in render(replace(job, array=Array(range(6))))


def test_a_chain_leaves_the_rest_to_its_next_job_until_it_gives_up(job: BatchJob, play, slurm: FakeSlurm):
    chained = replace(job, chained=True)
    code, said = play(75, job=chained)
    assert code == 75 and "left to the next job" in said
    for _ in range(3):
        assert play(1, job=chained)[0] == 1
    assert (job.run_dir / "outcome").read_text().startswith("gave up: exit code 1, failure 3")
    code, said = play(0, job=chained)
    assert code == 1 and "an earlier job gave up" in said
    assert len(slurm.calls("srun")) == 4 and requeued(slurm) == 0


def test_later_jobs_of_a_chain_leave_out_bad_nodes(job: BatchJob, play, slurm: FakeSlurm):
    (job.run_dir / "bad_nodes").write_text("n2\n")
    for id in ("6", "7", "8", "9"):
        note(job.run_dir, LedgerEntry(id, now(), "test", 2, 4, "submit.sbatch", f"logs/{id}.log"))
    assert play(75, job=replace(job, chained=True))[0] == 75
    updates = [call for call in slurm.calls("scontrol") if call.startswith("update")]
    assert updates == ["update JobId=8 ExcNodeList=n2", "update JobId=9 ExcNodeList=n2"]


@pytest.mark.parametrize("limit", ["00:04:00", "0-00:04:00", "00:01:00"])
def test_a_time_limit_that_leaves_no_time_for_a_step_counts_as_a_failure(
    job: BatchJob, play, slurm: FakeSlurm, limit: str
):
    slurm.answer("scontrol", f"JobId=7 RunTime=00:00:59 TimeLimit={limit} TimeMin=N/A")
    stopped = "stopped by SIGUSR1 at step 3 of 9"
    assert play(75, stopped, "step-00000003")[0] == 75
    assert not (job.run_dir / "failures").exists()
    for start in (1, 2, 3):
        code, said = play(75, stopped, start=start)
    assert code == 75 and "gives up: time limit before a step was done, failure 3 without a newer checkpoint" in said
    assert requeued(slurm) == 3


@pytest.mark.parametrize("limit", ["00:05:00", "1-00:00:00", "UNLIMITED"])
def test_being_told_to_stop_long_before_the_limit_is_no_failure(job: BatchJob, play, slurm: FakeSlurm, limit: str):
    slurm.answer("scontrol", f"JobId=7 RunTime=00:00:59 TimeLimit={limit} TimeMin=N/A")
    assert play(75, "stopped by SIGUSR1 at step 0 of 9")[0] == 75
    assert requeued(slurm) == 1 and not (job.run_dir / "failures").exists()


@pytest.mark.parametrize(("code", "newer"), [(2, ""), (2, "step-00000010"), (3, "")])
def test_what_another_start_would_repeat_is_not_started_again(job: BatchJob, play, slurm: FakeSlurm, code, newer):
    assert play(code, checkpoint=newer)[0] == code
    assert requeued(slurm) == 0
    assert (job.run_dir / "outcome").read_text().startswith(f"gave up: exit code {code}")


def test_data_that_fails_on_the_way_is_tried_again(play, slurm: FakeSlurm):
    assert play(3, checkpoint="step-00000010")[0] == 3 and requeued(slurm) == 1


def test_ranks_know_nothing_of_the_job_that_submitted_theirs(job: BatchJob, play, slurm: FakeSlurm):
    slurm.answer("srun")
    with (slurm.folder / "srun").open("r+") as script:
        lines = script.read().splitlines()
        lines.insert(1, f"env > '{job.run_dir}/seen'")
        script.seek(0)
        script.write("\n".join(lines) + "\n")
    path = f"{slurm.folder}{os.pathsep}{os.environ['PATH']}"
    environ = {"PATH": path, "SLURM_JOB_ID": "7", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x", "KEPT": "1"}
    subprocess.run(["bash", "-s"], input=render(job), env=environ, cwd=job.work_dir, text=True, check=False)
    seen = {line.partition("=")[0] for line in (job.run_dir / "seen").read_text().splitlines()}
    assert "KEPT" in seen and not seen & {"RANK", "WORLD_SIZE", "MASTER_ADDR"}


def test_a_setup_that_outlasts_the_limit_is_ended_before_it_and_counted(job: BatchJob, play, slurm: FakeSlurm):
    slurm.answer("scontrol", "JobId=7 RunTime=00:00:00 TimeLimit=00:03:00 TimeMin=N/A")
    long = replace(job, profile=replace(CPUS, setup=("export BEGUN=1", "/bin/sleep 60 >/dev/null 2>&1")))
    assert play(0, DONE, job=long, error="User defined signal 2")[0] == 140
    assert (job.run_dir / "failures").read_text().startswith("none time limit during the setup, job 7, ")
    assert slurm.calls("srun") == [] and requeued(slurm) == 1


def test_a_full_disk_leaves_no_empty_outcome(job: BatchJob, play, slurm: FakeSlurm):
    (job.run_dir / ".tmp-outcome").symlink_to("/dev/full")
    assert play(6, error="No space left on device")[0] == 6
    assert not (job.run_dir / "outcome").exists()


def test_a_failure_that_cannot_be_noted_is_the_last(job: BatchJob, play, slurm: FakeSlurm):
    (job.run_dir / "failures").mkdir()  # as on a full disk: it would be counted as none, and tried again for ever
    code, said = play(1, start=1, error="failures: Is a directory")
    assert code == 1 and "gives up: exit code 1, and" in said
    assert requeued(slurm) == 0


def test_values_are_quoted_for_sbatch_and_for_the_shell(job: BatchJob):
    profile = replace(CPUS, constraint="a&b", env={"X": 'say "hi" `now` $HOME'})
    text = render(replace(job, name='two "words"', profile=profile))
    assert '#SBATCH --job-name="two \\"words\\""' in text and '#SBATCH --constraint="a&b"' in text
    assert "run 100%%/logs/%j.log" in text and "run 100%'" in text
    assert 'export X="say \\"hi\\" \\`now\\` $HOME"' in text


@pytest.mark.parametrize("container", ["pyxis", "apptainer"])
def test_variables_are_filled_in_in_a_profile_and_not_in_paths(job: BatchJob, container: str):
    profile = replace(CPUS, container=container, image="$IMAGES/x.sqsh")
    folders = {"run_dir": Path("/r/it's $HOME `id`"), "work_dir": Path('/w/"$HOME"')}
    text = render(replace(job, profile=profile, **folders))
    words = text[text.index("step=(") : text.index('"${step[@]}" "${python')]
    command = f'IMAGES=/i\n{words}printf \'%s\\n\' "${{step[@]}}" "${{python[@]}}"'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    for path in folders.values():
        assert f"{path}:{path}" in done.stdout
    assert f"workdir={folders['work_dir']}\n" in done.stdout or f"--pwd={folders['work_dir']}\n" in done.stdout
    assert "/i/x.sqsh" in done.stdout


def test_torchrun_starts_one_task_per_node(job: BatchJob, play, slurm: FakeSlurm):
    slurm.answer("scontrol", "n1\nn2")
    profile = replace(CPUS, launcher="torchrun", cpus_per_node=8)
    torchrun = replace(job, profile=profile)
    text = render(torchrun)
    assert "#SBATCH --ntasks-per-node=1\n#SBATCH --cpus-per-task=8" in text and "OMP_NUM_THREADS=4" in text
    play(0, job=torchrun)
    (call,) = slurm.calls("srun")
    assert "-m torch.distributed.run --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d --rdzv-id=7" in call
    assert "--rdzv-endpoint=n1:15007" in call and "SIGUSR1 --shutdown-timeout=600 -m hopescale train" in call
