"""The Slurm cluster of the tests: started once for all processes that test, and what a test does with it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tests" / "slurm" / "cluster"
LIMIT_S = 400
"""Seconds after which what a test waits for is not coming."""

_ENDED = ("CANCELLED", "COMPLETED", "FAILED", "TIMEOUT")
_NOT_MADE_HERE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def missing() -> str | None:
    """Say why no cluster can be had on this machine; None if it can be tried."""
    if os.geteuid() != 0:
        return "a Slurm cluster needs root"
    if shutil.which("apt-get") is None:
        return "a Slurm cluster needs Debian"
    return None


class Cluster:
    """A running cluster of eight nodes with two partitions' worth of preemption and a stand-in for pyxis."""

    def __init__(self, configuration: Path):
        environ = {name: value for name, value in os.environ.items() if name not in _NOT_MADE_HERE}
        self.environ = {
            **environ,
            "SLURM_CONF": str(configuration),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }

    def run(self, *command: object, cwd: Path | None = None) -> str:
        """Run a command and return what it printed."""
        words = [str(word) for word in command]
        return self._printed(
            subprocess.run(words, capture_output=True, text=True, env=self.environ, cwd=cwd, check=False)
        )

    def _printed(self, done: subprocess.CompletedProcess[str]) -> str:
        assert done.returncode == 0, f"{' '.join(done.args)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def hopescale(self, *args: object, cwd: Path) -> str:
        """Run `hopescale ARGS` in a folder."""
        return self.run(sys.executable, "-m", "hopescale", *args, cwd=cwd)

    def refused(self, code: int, *args: object, cwd: Path) -> str:
        """Run `hopescale ARGS`, which has to end with an exit code, and return what it said."""
        words = [sys.executable, "-m", "hopescale", *map(str, args)]
        done = subprocess.run(words, capture_output=True, text=True, env=self.environ, cwd=cwd, check=False)
        assert done.returncode == code, f"{' '.join(words)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stderr

    def submit(self, *args: object, cwd: Path) -> list[str]:
        """Run `hopescale submit ARGS` and return the numbers of the jobs."""
        lines = self.hopescale("submit", *args, cwd=cwd).splitlines()
        return [line.removeprefix("job ").partition(",")[0] for line in lines]

    def node(self, verb: str, name: str) -> None:
        """Power a node off (`fail`) or on (`start`), and have Slurm know it at once."""
        self.run(TOOLS / "node", verb, name)
        if verb == "fail":
            self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=test")

    @contextmanager
    def own_disk(self, node: str, folder: Path, *options: str) -> Iterator[None]:
        """Show one node an empty disk of its own in place of a folder that the others see as it is.

        The disk is gone as soon as the node is powered off.

        Args:
            node: Name of the node.
            folder: Folder that is there.
            options: Options of mount.
        """
        run = Path(self.environ["SLURM_CONF"]).parent / "run"
        if (run / "mode").read_text().strip() != "netns":
            pytest.skip("the nodes of this cluster cannot have disks of their own")
        process = (run / f"slurmd-{node}.pid").read_text().strip()
        enter = ["nsenter", "-t", process, "-m"]
        self.run(*enter, "mount", "-t", "tmpfs", *options, "none", folder)
        try:
            yield
        finally:
            if (run / f"slurmd-{node}.pid").read_text().strip() == process:
                self.run(*enter, "umount", "-l", folder)

    def job(self, id: str) -> dict[str, str]:
        """Return what Slurm says of a job; a controller that drops the connection kills scontrol, which asks again."""
        ask = ["scontrol", "show", "job", "-o", id]
        done = subprocess.run(ask, capture_output=True, text=True, env=self.environ, check=False)
        fields = (self.run(*ask) if done.returncode == -signal.SIGPIPE else self._printed(done)).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def hosts(self, id: str) -> list[str]:
        """Return the names of the nodes of a job."""
        return self.run("scontrol", "show", "hostnames", self.job(id)["NodeList"]).split()

    def ended(self, id: str) -> dict[str, str]:
        """Wait for the end of a job, and return what Slurm says of it."""
        return self.wait(lambda: self.if_ended(id), f"job {id} to end")

    def if_ended(self, id: str) -> dict[str, str] | None:
        """Return what Slurm says of a job that has ended; None of others."""
        job = self.job(id)
        return job if job["JobState"] in _ENDED else None

    def restarted(self, id: str, count: int) -> None:
        """Wait until a job runs for the `count`-th time after its first."""
        self.wait(lambda: self._runs_again(id, count), f"start {count} of job {id}")

    def ranks(self, id: str) -> dict[int, int]:
        """Return the process of every rank of a job that runs, by rank."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                environ = set((process / "environ").read_bytes().split(b"\0"))
                words = (process / "cmdline").read_bytes().split(b"\0")
                if f"SLURM_JOB_ID={id}".encode() in environ and b"train" in words and b"-c" not in words:
                    values = dict(entry.split(b"=", 1) for entry in environ if b"=" in entry)
                    if rank := values.get(b"RANK") or values.get(b"SLURM_PROCID"):
                        found[int(rank)] = int(process.name)
        return found

    def signal(self, id: str, number: signal.Signals, *ranks: int) -> None:
        """Send a signal to some ranks of a job, or to all."""
        for rank, process in self.ranks(id).items():
            if not ranks or rank in ranks:
                os.kill(process, number)

    def wait(self, condition: Callable[[], object], what: str) -> object:
        """Wait until a condition is true, and return its value."""
        deadline = time.monotonic() + LIMIT_S
        while not (value := condition()):
            assert time.monotonic() < deadline, f"waited in vain for {what}\n{self.run('squeue')}"
            time.sleep(0.2)
        return value

    def _runs_again(self, id: str, count: int) -> bool:
        job = self.job(id)
        assert job["JobState"] not in _ENDED, job
        return int(job["Restarts"]) == count and job["JobState"] == "RUNNING"


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Start the cluster unless another process has, and stop it unless another process uses it.

    Raises:
        LookupError: If Slurm is not installed and cannot be: there is no network.
        RuntimeError: If it does not start.
    """
    with _lock_file("users") as users, _lock_file("start") as start:
        fcntl.flock(users, fcntl.LOCK_SH)
        fcntl.flock(start, fcntl.LOCK_EX)
        command = [TOOLS / "start", "--nodes", "8", "--pyxis-stub"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LookupError(done.stderr) if "apt-get failed" in done.stderr else RuntimeError(done.stderr)
        fcntl.flock(start, fcntl.LOCK_UN)
        try:
            yield Cluster(Path(done.stdout.strip().rpartition("=")[2]))
        finally:
            fcntl.flock(start, fcntl.LOCK_EX)
            with suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                subprocess.run([TOOLS / "stop", "--quiet"], check=True)


@contextmanager
def exclusive() -> Iterator[None]:
    """Have the cluster alone: tests switch off nodes."""
    with _lock_file("test") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def steps(run_dir: Path) -> dict[int, dict[str, float]]:
    """Return the record of a run by step, without what depends on the clock."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return {}
    records = []
    for line in lines:
        with suppress(ValueError):  # the last one is being written
            records.append(json.loads(line))
    kept = ("loss", "grad_norm", "level/", "memory/", "lr/", "tokens_seen")
    return {int(record["step"]): {k: v for k, v in record.items() if k.startswith(kept)} for record in records}


def _lock_file(name: str):
    return (Path(tempfile.gettempdir()) / f"hopescale-test-slurm-{name}.lock").open("w")
