"""Asks Slurm about jobs, and tells it to start and stop them: by the text of its commands, alike in all versions."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hopescale.common.errors import LaunchError

UNKNOWN = "UNKNOWN"
"""State of a job of which nothing can be learned now; its reason says why."""
GONE = "GONE"
"""State of a job that Slurm has forgotten, minutes after its end where there is no accounting."""

_ENDED = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")
    + ("REVOKED", "TIMEOUT", GONE)
)
_NOT_KNOWN = re.compile(r"Invalid job id|Job \S+ not found")
_FIELD = re.compile(r"(?:^| )([A-Za-z]+)=(.*?)(?= [A-Za-z:/]+=|\s*$)")
_GPUS = re.compile(r"\bgpu(?::[^:,()]+)?:(\d+)(?=[,(]|$)")
_MISSING = ("", "(null)", "None", "Unknown", "None assigned")
_SACCT_FIELDS = ("JobID", "State", "ExitCode", "Reason", "NodeList", "Start")
_DEFAULT_MAX_ARRAY_SIZE = 1001
_DIRECTIVE = re.compile(r"^#SBATCH --([a-z-]+)", re.MULTILINE)
_OTHER_NAMES = {
    "timelimit": "time",
    "array_inx": "array",
    "mem_per_node": "mem",
    "mem_per_cpu": "mem",
    "mem_per_gpu": "mem",
    "no_requeue": "requeue",
    "requeue": "no_requeue",
    "gres": "gpus_per_node",
    "gpus": "gpus_per_node",
}
"""Variables of sbatch, less their prefix, and the option that they name or contradict."""
_OF_THE_CLUSTER = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_CONF_SERVER")
"""Variables that say which Slurm is meant; all others of that prefix are an allocation's."""
_ORDER_PATIENCE = 10
"""An order is waited for so many times as long as an answer: one that is given up may have been carried out."""


@dataclass(frozen=True)
class SlurmJob:
    """What is known of a job, or of one element of an array; None is what is not told."""

    id: str
    """Number of a job, or `4220_1` for an element."""
    state: str
    """Slurm's word, as `PENDING`, `RUNNING` or `FAILED`; or `UNKNOWN`, or `GONE`."""
    reason: str | None = None
    nodes: str | None = None
    """Names of its nodes as Slurm writes them."""
    restarts: int | None = None
    exit_code: str | None = None
    """Exit code of the script and signal, as `137:0`; None while it has not ended."""
    start: str | None = None
    """Local time at which it started or is expected to."""

    @property
    def live(self) -> bool | None:
        """Whether it runs or waits to run; None where that cannot be learned."""
        return None if self.state == UNKNOWN else self.state not in _ENDED


@dataclass(frozen=True)
class Partition:
    """A partition, with the number of its nodes and the most GPUs that one of them has."""

    name: str
    nodes: int
    gpus_per_node: int
    max_time: str = "infinite"
    """Longest time limit that it allows, as Slurm writes it."""


class _CannotAsk(Exception):
    """A command that is missing, did not answer, or did not reach Slurm. The text is the reason."""


class _NoAnswer(LaunchError):
    """A command that did not end in time."""


class Slurm:
    """Slurm as reached from this machine. Answers are kept: make a new object to ask again.

    Args:
        timeout_s: Seconds to wait for an answer, a tenth of those for an order to be taken. Where the controller is
            down, commands try for 9 s and longer.
    """

    def __init__(self, *, timeout_s: float = 12):
        self._timeout_s = timeout_s
        self._answers: dict[str, list[SlurmJob]] = {}
        self._unreachable: dict[str, str] = {}

    def job(self, id: str) -> SlurmJob:
        """Return what is known of a job or of one element; the state `UNKNOWN` if Slurm cannot be asked."""
        known = self.jobs(id.partition("_")[0])
        first = known[0]
        other = SlurmJob(id, UNKNOWN, first.reason) if first.state == UNKNOWN else SlurmJob(id, GONE)
        return next((job for job in known if job.id == id), other)

    def jobs(self, number: str) -> list[SlurmJob]:
        """Return what is known of a job; of an array, one entry per element. Never empty.

        Asks the controller, which forgets a job minutes after its end, then accounting where there is any.
        """
        if number not in self._answers:
            self._answers[number] = self._controller(number) or self._accounting(number)
        return self._answers[number]

    def submit(self, script: Path, *options: str) -> str:
        """Submit a script, and return the number of the job. What the script says counts, not the environment.

        Raises:
            LaunchError: If it is refused, or there is no Slurm.
        """
        environ = submitted_environ(os.environ, _text(script))
        return self._told("sbatch", "--parsable", *options, str(script), environ=environ).strip().partition(";")[0]

    def expected_start(self, script: Path, *options: str) -> str:
        """Return what Slurm says of when and where a script would start; it is not submitted.

        Raises:
            LaunchError: If it would be refused, or Slurm cannot be asked.
        """
        environ = submitted_environ(os.environ, _text(script))
        done = self._run("sbatch", "--test-only", *options, str(script), environ=environ)
        if done.returncode:
            raise _refusal("sbatch", done)
        return re.sub(r"^sbatch: Job \d+ ", "", done.stderr.strip())

    def cancel(self, id: str) -> None:
        """End a job, or an element, for good; nothing happens if it has ended.

        Raises:
            LaunchError: If Slurm refuses or cannot be asked.
        """
        self._told("scancel", id)

    def ask_to_stop(self, id: str) -> None:
        """Send SIGUSR1 to the ranks of a running job: they save their state, and its script has it requeued.

        Raises:
            LaunchError: If Slurm refuses or cannot be asked.
        """
        self._told("scancel", "--signal=USR1", id)

    def max_array_size(self) -> int:
        """Return `MaxArraySize`, which every index of an array stays below; 1001 where Slurm cannot be asked."""
        try:
            match = re.search(r"^MaxArraySize\s*=\s*(\d+)", self._asked("scontrol", "show", "config").stdout, re.M)
        except _CannotAsk:
            match = None
        return int(match[1]) if match else _DEFAULT_MAX_ARRAY_SIZE

    def partitions(self) -> list[Partition] | None:
        """Return the cluster's partitions, hidden ones too, the default one first; None where Slurm cannot be asked."""
        try:
            lines = self._asked("sinfo", "--all", "-h", "-o", "%P|%D|%G|%l").stdout.splitlines()
        except _CannotAsk:
            return None
        nodes, gpus, default, times = Counter[str](), Counter[str](), "", {}
        for marked, count, gres, max_time in (line.split("|") for line in lines):
            name = marked.removesuffix("*")
            default, times[name] = name if name != marked else default, max_time
            nodes[name] += int(count)
            gpus[name] = max(gpus[name], sum(int(found) for found in _GPUS.findall(gres)))
        names = sorted(nodes, key=lambda name: name != default)
        return [Partition(name, nodes[name], gpus[name], times[name]) for name in names]

    def has_ranks(self, id: str) -> bool:
        """Look whether a running job has a step, to which signals go; the setup of a batch script is none.

        Raises:
            LaunchError: If Slurm cannot be asked.
        """
        try:
            steps = self._asked("squeue", "--steps", "-h", "-j", id.partition("_")[0], "-o", "%i").stdout.split()
        except _CannotAsk as error:
            raise LaunchError(str(error), "try again later") from None
        jobs = {job for job, _, step in (step.rpartition(".") for step in steps) if step.isdigit()}
        return id in jobs or ("_" in id and id.partition("_")[0] in jobs)

    def _controller(self, number: str) -> list[SlurmJob]:
        """Ask slurmctld; nothing if it has forgotten the job or cannot be asked."""
        try:
            done = self._asked("scontrol", "show", "job", "-o", number)
        except _CannotAsk:
            return []
        return [job for line in done.stdout.splitlines() for job in _parse_job(line)]

    def _accounting(self, number: str) -> list[SlurmJob]:
        """Ask slurmdbd. Without the controller's word, its own counts only if the job has ended."""
        reason, jobs = self._unreachable.get("scontrol"), []
        with suppress(_CannotAsk):
            lines = self._asked("sacct", "-X", "-n", "-P", "-j", number, "-o", ",".join(_SACCT_FIELDS)).stdout
            jobs = [job for line in lines.splitlines() for job in _parse_accounting(line)]
        if reason is not None:
            jobs = [job if job.live is False else SlurmJob(job.id, UNKNOWN, reason) for job in jobs]
        return jobs or [SlurmJob(number, UNKNOWN, reason) if reason else SlurmJob(number, GONE)]

    def _asked(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command that asks. One that could not reach Slurm is not tried again.

        Raises:
            _CannotAsk: Unless Slurm has answered; that it knows no such job is an answer.
        """
        name = command[0]
        if name in self._unreachable:
            raise _CannotAsk(self._unreachable[name])
        try:
            done = self._run(*command)
        except LaunchError as error:
            reason = error.message
        else:
            if not done.returncode or _NOT_KNOWN.search(done.stderr + done.stdout):
                return done
            reason = _last_line(done) or f"{name} ended with exit code {done.returncode}"
        self._unreachable[name] = reason
        raise _CannotAsk(reason)

    def _told(self, *command: str, environ: Mapping[str, str] | None = None) -> str:
        """Run a command that changes something; answers kept until now count no more."""
        try:
            done = self._run(*command, environ=environ, timeout_s=_ORDER_PATIENCE * self._timeout_s)
        except _NoAnswer as error:
            hint = "look with `squeue --me` whether it was carried out all the same"
            raise LaunchError(error.message, hint) from None
        finally:
            self._answers.clear()
        if done.returncode:
            raise _refusal(command[0], done)
        return done.stdout

    def _run(
        self, *command: str, environ: Mapping[str, str] | None = None, timeout_s: float | None = None
    ) -> subprocess.CompletedProcess[str]:
        timeout_s = timeout_s or self._timeout_s
        # Long lists of elements end in "..." unless told otherwise; times and messages must not depend on a locale.
        environ = {
            **(os.environ if environ is None else environ),
            "SLURM_BITSTR_LEN": "0",
            "SLURM_TIME_FORMAT": "standard",
            "LC_ALL": "C",
        }
        try:
            return subprocess.run(
                command, capture_output=True, text=True, env=environ, timeout=timeout_s, stdin=subprocess.DEVNULL
            )
        except FileNotFoundError:
            raise LaunchError(f"there is no command {command[0]} here", "run this where jobs are submitted") from None
        except subprocess.TimeoutExpired:
            raise _NoAnswer(f"{command[0]} gave no answer within {timeout_s:g} s", "try again later") from None
        except OSError as error:
            raise LaunchError(f"cannot run {command[0]}: {error.strerror}") from error


def submitted_environ(environ: Mapping[str, str], script: str) -> dict[str, str]:
    """Return the environment that sbatch gets: without what would beat the script, or reach its steps from elsewhere.

    Variables of sbatch count more than a script's own lines, and the job inherits those of an allocation in which it is
    submitted. Variables of sbatch about what the script leaves open stay.

    Args:
        environ: Environment of this process.
        script: Text of the batch script.
    """
    said = {option.replace("-", "_") for option in _DIRECTIVE.findall(script)}
    said |= {variable for variable, option in _OTHER_NAMES.items() if option in said}

    def stays(name: str) -> bool:
        if name.startswith("SBATCH_"):
            return name.removeprefix("SBATCH_").lower() not in said
        return not name.startswith("SLURM_") or name in _OF_THE_CLUSTER

    return {name: value for name, value in environ.items() if stays(name)}


def elements_of(text: str) -> list[int]:
    """Return the indices that Slurm writes as `0,2-8:2%3`."""
    numbers: list[int] = []
    for part in text.partition("%")[0].strip("[]").split(","):
        if match := re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part):
            first, last, stride = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
            numbers += range(first, last + 1, stride)
    return numbers


def _text(script: Path) -> str:
    try:
        return script.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # sbatch says why it cannot be read


def _parse_job(line: str) -> list[SlurmJob]:
    """Read a line of `scontrol show job -o`: one job, or the elements that share one record."""
    fields: dict[str, str] = {}
    for name, value in _FIELD.findall(line):
        fields.setdefault(name, value.strip())
    if "JobState" not in fields:
        return []
    ids = _element_ids(fields.get("ArrayJobId", ""), fields.get("ArrayTaskId", "")) or [fields["JobId"]]
    names = ("JobState", "Reason", "NodeList", "Restarts", "ExitCode", "StartTime")
    return [_job(id, *(fields.get(name, "") for name in names)) for id in ids]


def _parse_accounting(line: str) -> list[SlurmJob]:
    """Read a line of `sacct -P`; elements that never started share one: `4225_[4,6-8%1]`."""
    values = line.split("|")
    if len(values) != len(_SACCT_FIELDS):
        return []
    number, state, exit_code, reason, nodes, start = values
    ids = _element_ids(*number.partition("_")[::2]) or [number]
    return [_job(id, state.split()[0], reason, nodes, "", exit_code, start) for id in ids]


def _element_ids(number: str, elements: str) -> list[str]:
    return [f"{number}_{element}" for element in elements_of(elements)]


def _job(id: str, state: str, reason: str, nodes: str, restarts: str, exit_code: str, start: str) -> SlurmJob:
    return SlurmJob(
        id,
        state,
        reason=_said(reason),
        nodes=_said(nodes),
        restarts=int(restarts) if restarts else None,
        exit_code=_said(exit_code) if state in _ENDED else None,
        start=_said(start),
    )


def _said(value: str) -> str | None:
    return None if value in _MISSING else value


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stderr.strip() or done.stdout.strip()).splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _refusal(name: str, done: subprocess.CompletedProcess[str]) -> LaunchError:
    reason = "; ".join(dict.fromkeys(line.strip() for line in done.stderr.splitlines() if line.strip()))
    reason = reason or done.stdout.strip() or f"exit code {done.returncode}"
    return LaunchError(f"{name} refused: {reason}" if not reason.startswith(f"{name}:") else reason)
