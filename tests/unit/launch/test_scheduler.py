from __future__ import annotations

import pytest

from hopescale.common.errors import LaunchError
from hopescale.launch.scheduler import GONE, UNKNOWN, Slurm, SlurmJob, elements_of, submitted_environ
from tests.support.fake_slurm import CONTROLLER_DOWN, NO_ACCOUNTING, NOT_KNOWN, record


def test_the_controller_is_asked_first(fake):
    fake.answer("scontrol", record("4219", "RUNNING", Restarts="2", ExitCode="0:0", NodeList="node[1-2]"))
    fake.answer("sacct", "4219|PENDING|0:0|None|node1|2026-11-22T04:54:24")
    job = Slurm().job("4219")
    assert job == SlurmJob("4219", "RUNNING", nodes="node[1-2]", restarts=2, start="2026-11-22T04:54:24")
    assert job.live is True and fake.calls("scontrol") == ["show job -o 4219"] and not fake.calls("sacct")


def test_an_ended_job_has_its_true_exit_code_and_reason(fake):
    fake.answer("scontrol", record("7", "FAILED", Reason="NonZeroExitCode", ExitCode="137:0"))
    job = Slurm().job("7")
    assert (job.state, job.reason, job.exit_code, job.live) == ("FAILED", "NonZeroExitCode", "137:0", False)


def test_a_forgotten_job_is_looked_up_in_accounting(fake):
    fake.answer("scontrol", error=NOT_KNOWN, code=1)
    fake.answer("sacct", "4219|CANCELLED by 0|0:0|None|node1|2026-11-22T04:54:24")
    job = Slurm().job("4219")
    assert (job.state, job.nodes, job.restarts, job.live) == ("CANCELLED", "node1", None, False)


@pytest.mark.parametrize("accounting", [("", "", 0), ("", NO_ACCOUNTING, 1)])
def test_a_job_nobody_knows_is_gone(fake, accounting):
    fake.answer("scontrol", error=NOT_KNOWN, code=1)
    out, error, code = accounting
    fake.answer("sacct", out, error=error, code=code)
    assert Slurm().job("9") == SlurmJob("9", GONE)
    assert SlurmJob("9", GONE).live is False


def test_a_controller_that_is_down_is_unknown_and_not_gone(fake):
    fake.controller_down()
    slurm = Slurm()
    assert slurm.job("9") == SlurmJob("9", UNKNOWN, CONTROLLER_DOWN)
    assert slurm.job("9").live is None
    assert slurm.job("10_3") == SlurmJob("10_3", UNKNOWN, CONTROLLER_DOWN)
    assert len(fake.calls("scontrol")) == 1  # each attempt takes seconds


def test_accounting_alone_is_believed_of_what_has_ended(fake):
    fake.controller_down()
    fake.answer("sacct", "5|RUNNING|0:0|None|node1|2026-11-22T04:54:24")
    assert Slurm().job("5") == SlurmJob("5", UNKNOWN, CONTROLLER_DOWN)
    fake.answer("sacct", "5|COMPLETED|0:0|None|node1|2026-11-22T04:54:24")
    assert Slurm().job("5").state == "COMPLETED"


def test_without_slurm_nothing_is_known(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    slurm = Slurm()
    assert slurm.job("1") == SlurmJob("1", UNKNOWN, "there is no command scontrol here")
    assert slurm.max_array_size() == 1001
    with pytest.raises(LaunchError, match="no command sbatch"):
        slurm.submit(tmp_path / "x")


def test_a_silent_controller_is_unknown(fake):
    (fake.folder / "scontrol").write_text("#!/bin/sh\nexec sleep 30\n")
    job = Slurm(timeout_s=0.2).job("1")
    assert (job.state, job.reason) == (UNKNOWN, "scontrol gave no answer within 0.2 s")


def test_an_order_is_not_given_up_as_soon_as_a_question(fake, tmp_path):
    (fake.folder / "sbatch").write_text("#!/bin/sh\nsleep 1\necho 5\n")
    (fake.folder / "sbatch").chmod(0o755)
    assert Slurm(timeout_s=0.8).submit(tmp_path / "x") == "5"
    (fake.folder / "sbatch").write_text("#!/bin/sh\nexec sleep 30\n")
    with pytest.raises(LaunchError, match="no answer within 0.2 s") as caught:
        Slurm(timeout_s=0.02).submit(tmp_path / "x")
    assert "squeue" in caught.value.hint


def test_elements_of_an_array(fake):
    lines = [
        record("4220", "PENDING", array="2-3,6%2", Reason="JobArrayTaskLimit", NodeList="", StartTime="Unknown"),
        record("4222", "RUNNING", array="1", ArrayJobId="4220"),
        record("4221", "FAILED", array="0", ArrayJobId="4220", ExitCode="3:0"),
    ]
    fake.answer("scontrol", "\n".join(lines))
    slurm = Slurm()
    states = {job.id: job.state for job in slurm.jobs("4220")}
    assert states == {
        **{f"4220_{index}": "PENDING" for index in (2, 3, 6)},
        "4220_1": "RUNNING",
        "4220_0": "FAILED",
    }
    waiting = SlurmJob("4220_6", "PENDING", "JobArrayTaskLimit", restarts=0)
    assert slurm.job("4220_6") == waiting
    assert slurm.job("4220_0").exit_code == "3:0"
    assert slurm.job("4220_9").state == GONE
    assert len(fake.calls("scontrol")) == 1


def test_elements_in_accounting(fake):
    fake.answer("scontrol", error=NOT_KNOWN, code=1)
    fake.answer("sacct", "4225_2|FAILED|1:0|None|node1|t\n4225_[4,6-8:2%1]|CANCELLED by 0|0:0|None||Unknown")
    assert [(job.id, job.state) for job in Slurm().jobs("4225")] == [
        ("4225_2", "FAILED"),
        *((f"4225_{index}", "CANCELLED") for index in (4, 6, 8)),
    ]


def test_indices_as_slurm_writes_them():
    assert elements_of("0,2-8:3,11-12%4") == [0, 2, 5, 8, 11, 12]
    assert elements_of("N/A") == []


def test_submitting(fake, tmp_path):
    fake.answer("sbatch", "4230;cluster2")
    assert Slurm().submit(tmp_path / "x.sbatch", "--array=0-3%2") == "4230"
    assert fake.calls("sbatch") == [f"--parsable --array=0-3%2 {tmp_path / 'x.sbatch'}"]
    error = "sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job submission failed: Invalid"
    fake.answer("sbatch", error=error, code=1)
    with pytest.raises(LaunchError, match="invalid partition specified: nope.*submission failed"):
        Slurm().submit(tmp_path / "x.sbatch")


def test_the_environment_does_not_beat_the_script():
    script = "#!/bin/bash\n#SBATCH --time=10\n#SBATCH --mem=0\n#SBATCH --requeue\n#SBATCH --gpus-per-node=8\n"
    beats = ("SBATCH_TIMELIMIT", "SBATCH_NO_REQUEUE", "SBATCH_REQUEUE", "SBATCH_GPUS_PER_NODE", "SBATCH_MEM_PER_CPU")
    beats += ("SLURM_MEM_PER_CPU", "SLURM_JOB_ID", "SLURM_NTASKS")
    stays = ("SBATCH_ACCOUNT", "SBATCH_PARTITION", "SLURM_CONF", "HOME", "RANK")
    assert sorted(submitted_environ(dict.fromkeys(beats + stays, "1"), script)) == sorted(stays)


def test_the_start_that_is_expected(fake, tmp_path):
    fake.answer("sbatch", error="sbatch: Job 4230 to start at 2026-11-22T04:56:17 using 1 processors on nodes node1")
    expected = "to start at 2026-11-22T04:56:17 using 1 processors on nodes node1"
    assert Slurm().expected_start(tmp_path / "x") == expected
    fake.answer("sbatch", error="allocation failure: Requested node configuration is not available", code=1)
    with pytest.raises(LaunchError, match="node configuration is not available"):
        Slurm().expected_start(tmp_path / "x")


def test_what_was_asked_before_an_order_is_asked_again(fake):
    fake.answer("scontrol", record("7", "RUNNING"))
    slurm = Slurm()
    assert slurm.job("7").live
    slurm.ask_to_stop("7")
    slurm.cancel("7")
    fake.answer("scontrol", record("7", "CANCELLED"))
    assert slurm.job("7").live is False
    assert fake.calls("scancel") == ["--signal=USR1 7", "7"]
    fake.controller_down()
    with pytest.raises(LaunchError, match="Unable to contact slurm controller"):
        slurm.cancel("7")


def test_the_largest_array(fake):
    fake.answer("scontrol", "Configuration data as of now\nMaxArraySize            = 5001\nMaxJobCount = 10000")
    assert Slurm().max_array_size() == 5001
