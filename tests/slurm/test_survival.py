"""Jobs that are interrupted in every way a cluster knows, side by side on a real one, and the runs that come of it."""

from __future__ import annotations

import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from tests.support.cluster import Cluster, steps
from tests.support.tiny import TINY

STEPS = 60
RUN = (
    "debug",
    *TINY,
    f"train.steps={STEPS}",
    "train.validation.every=null",
    "checkpoint.every=5",
    "parallel.tp=2",
)
"""Two tensor-parallel ranks, and as many replicas as ranks remain."""

FIRST_HALF, SECOND_HALF = "--exclude=node[5-8]", "--exclude=node[1-4]"


class Scene:
    """One run on the cluster."""

    def __init__(self, slurm: Cluster, folder: Path, profile: Path, *args: object):
        self.slurm, self.run = slurm, folder / profile.stem
        self.ids = slurm.submit(*RUN, *args, "--cluster", profile, "--run-dir", self.run, cwd=folder)
        self.id = self.ids[0]

    def log(self, id: str | None = None) -> str:
        return (self.run / "logs" / f"{id or self.id}.log").read_text()

    def at_step(self, step: int) -> int:
        """Wait until a step has been recorded; return the last one."""
        self.slurm.wait(lambda: self.has_step(step), f"step {step} of {self.run.name}")
        return max(steps(self.run))

    def has_step(self, step: int) -> bool:
        assert self.slurm.if_ended(self.id) is None, self.log()
        return max(steps(self.run), default=0) >= step

    def halt_at_step(self, step: int) -> None:
        """Let the run stand still from a step on, until Slurm sends it a signal."""
        self.at_step(step)
        self.slurm.signal(self.id, signal.SIGSTOP)

    def restarts(self) -> int:
        return int(self.slurm.job(self.id)["Restarts"])

    def completed(self) -> None:
        job = self.slurm.ended(self.id)
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), self.log()
        assert (self.run / "outcome").read_text() == f"done at step {STEPS} of {STEPS}\n"


def test_runs_survive(slurm: Cluster, tmp_path: Path, profile):
    def uninterrupted() -> Path:
        slurm.hopescale("train", *RUN, "--nproc", "4", "--run-dir", tmp_path / "whole", cwd=tmp_path)
        return tmp_path / "whole"

    container = ("container: pyxis", "image: some.sqsh", f"python: {sys.executable}")
    here = f"sbatch: [{SECOND_HALF!r}]"
    # The limit's signal comes after 10 to 40 s, the limit itself much later.
    at_once = ('time: "3"', "signal_lead_s: 170", "max_failures: 20")
    limits = profile("limits", *at_once, *container, here)
    survivor = profile("survivor", "partition: preempt", f"sbatch: [{FIRST_HALF!r}]")
    in_turn = {
        chain: profile("chain", here),
        torchrun: profile("torchrun", "launcher: torchrun", here),
        cancelled: profile("cancelled", here),
        lasting_failure: profile("lasting", "ranks_per_node: 1", here),
        endless_setup: profile("setup", 'time: "1"', "max_failures: 0", 'setup: ["sleep 600"]', here),
    }

    def one_after_another() -> None:
        for scene, written in in_turn.items():
            scene(slurm, tmp_path, written)

    with ThreadPoolExecutor() as pool:
        whole = pool.submit(uninterrupted)
        played = [
            pool.submit(time_limits, slurm, tmp_path, limits),
            pool.submit(preemption_crash_and_lost_node, slurm, tmp_path, survivor),
            pool.submit(one_after_another),
        ]
    failures = [error for future in [whole, *played] if (error := future.exception())]
    if failures:
        raise ExceptionGroup("scenes", failures)
    expected = steps(whole.result())
    assert list(expected) == list(range(1, STEPS + 1))
    for name in ("limits", "survivor"):
        assert steps(tmp_path / name) == expected, name


def time_limits(slurm: Cluster, folder: Path, profile: Path) -> None:
    """Two nodes of two ranks, in a container; the time limit is reached twice."""
    scene = Scene(slurm, folder, profile, "--nodes", 2)
    images, minutes, reached = [], 3, 0
    while reached < 2:
        restarts, step = scene.restarts(), max(steps(scene.run), default=0) + 5
        slurm.wait(
            lambda r=restarts, s=step: scene.restarts() > r or scene.has_step(s), f"step {step} of the limited run"
        )
        if scene.restarts() > restarts:  # on a slow machine the limit comes before training begins
            minutes += 1
            slurm.run("scontrol", "update", f"JobId={scene.id}", f"TimeLimit={minutes}")
            continue
        slurm.signal(scene.id, signal.SIGSTOP)
        with suppress(FileNotFoundError):  # the limit may come at any moment
            images += [image_of(process) for process in slurm.ranks(scene.id).values()]
        slurm.restarted(scene.id, restarts + 1)
        reached += 1
    assert set(images) == {"some.sqsh"}
    slurm.run("scontrol", "update", f"JobId={scene.id}", "TimeLimit=30")
    scene.completed()
    log = scene.log()
    assert log.count("SIGUSR1 at step ") == log.count("] requeue: ") == scene.restarts() >= 2, log
    assert "4 ranks (dp 2, tp 2, pp 1)" in log and log.count("0: resumed from ") >= 2, log
    assert log.count("requeue: told to stop") >= 2 and "requeue: exit code" not in log, log


def image_of(process: int) -> str:
    """Return the container's image that a process was started in."""
    environ = Path(f"/proc/{process}/environ").read_text().split("\0")
    return next(entry.partition("=")[2] for entry in environ if entry.startswith("PYXIS_STUB_CONTAINER_IMAGE="))


def preemption_crash_and_lost_node(slurm: Cluster, folder: Path, profile: Path) -> None:
    """Each of them costs a start, and a job that waits for this one waits through all of them."""
    scene = Scene(slurm, folder, profile, "--nodes", 2)
    outcome = folder / "seen_by_dependent"
    wrapped = f"cp {scene.run}/outcome {outcome}"
    options = (f"--dependency=afterok:{scene.id}", f"--output={folder}/dependent.log", FIRST_HALF)
    dependent = slurm.run("sbatch", "--parsable", *options, f"--wrap={wrapped}").strip()

    scene.halt_at_step(5)
    node = slurm.hosts(scene.id)[0]
    slurm.run("sbatch", "--partition=urgent", "--exclusive", f"--nodelist={node}", "--output=/dev/null", "--wrap=true")
    slurm.restarted(scene.id, 1)

    scene.at_step(15)
    slurm.signal(scene.id, signal.SIGKILL, 1)
    slurm.restarted(scene.id, 2)

    before = scene.at_step(30)
    assert slurm.job(dependent)["JobState"] == "PENDING"
    hosts = slurm.hosts(scene.id)
    slurm.node("fail", hosts[1])
    slurm.restarted(scene.id, 3)
    assert hosts[1] not in slurm.hosts(scene.id) and len(slurm.hosts(scene.id)) == 2
    slurm.node("start", hosts[1])
    scene.completed()
    log = scene.log()  # Slurm itself requeues a preempted job whose ranks take longer to end than its grace
    assert log.count("SIGUSR1 at step ") == 1 and log.count("failure 1 of 3") == 1, log
    assert log.count("starts at checkpoint none") == 1 and log.count(" starts at checkpoint step-") == 3, log
    assert f"step-{(before // 5 - 1) * 5:08d}" <= log.rpartition("starts at checkpoint ")[2].split()[0]
    assert (scene.run / "failures").read_text().count("\n") == 1
    assert slurm.ended(dependent)["JobState"] == "COMPLETED"
    assert outcome.read_text() == (scene.run / "outcome").read_text()


def chain(slurm: Cluster, folder: Path, profile: Path) -> None:
    """The first job is told to stop, the second goes on, and for the third there is nothing left."""
    scene = Scene(slurm, folder, profile, "--chain", 3)
    first, second, third = scene.ids
    scene.at_step(5)
    slurm.run("scancel", "--signal=USR1", first)
    job = slurm.ended(first)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "75:0", "0"), scene.log()
    scene.id = second
    scene.completed()
    assert slurm.ended(third)["JobState"] == "COMPLETED"
    assert "left to the next job: told to stop" in scene.log(first) and "resumed from" in scene.log(second)
    assert "the run is done" in scene.log(third) and "starts at checkpoint" not in scene.log(third)


def torchrun(slurm: Cluster, folder: Path, profile: Path) -> None:
    """Its own exit code says nothing; what the run left in its folder does."""
    scene = Scene(slurm, folder, profile)
    scene.at_step(5)
    slurm.run("scancel", "--signal=USR1", scene.id)
    slurm.restarted(scene.id, 1)
    scene.completed()
    assert "ended with 75" in scene.log() and "requeue: told to stop" in scene.log()


def cancelled(slurm: Cluster, folder: Path, profile: Path) -> None:
    """What its user has ended does not come back."""
    scene = Scene(slurm, folder, profile)
    scene.at_step(5)
    slurm.run("scancel", scene.id)
    job = slurm.ended(scene.id)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    slurm.wait(lambda: not slurm.ranks(scene.id), "ranks of a cancelled job to end")
    time.sleep(1)
    assert slurm.job(scene.id)["JobState"] == "CANCELLED" and "requeue:" not in scene.log()


def lasting_failure(slurm: Cluster, folder: Path, profile: Path) -> None:
    """What every start would meet is not tried again, and told with its own exit code."""
    scene = Scene(
        slurm,
        folder,
        profile,
        "data.sources.markov=null",
        "data.sources.main.path=nowhere",
        "parallel.tp=1",
        "--skip-data-check",
    )
    job = slurm.ended(scene.id)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "3:0", "0"), scene.log()
    assert (scene.run / "outcome").read_text().startswith("gave up: exit code 3 before a step was done")
    assert "data error" in scene.log() and "gives up" in scene.log()


def endless_setup(slurm: Cluster, folder: Path, profile: Path) -> None:
    """Slurm's signal reaches no setup; a start that is still in it before the limit is a failure."""
    scene = Scene(slurm, folder, profile)
    job = slurm.ended(scene.id)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "0"), scene.log()
    assert (scene.run / "outcome").read_text().startswith("gave up: time limit during the setup, failure 1 ")
