"""The batch script of a run: plain text from a template, a profile and a few facts. Needs no Slurm."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hopescale.common.paths import shipped_folder
from hopescale.launch.profile import ClusterProfile

_PLACEHOLDER = re.compile(r"@(\w+)@")
_PLAIN = re.compile(r"[\w@%+=:,./~-]*")
_LONG = 100
_TORCHRUN_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
_SHUTDOWN_TIMEOUT_S = 600


@dataclass(frozen=True)
class Array:
    """Many runs as one job; `elements/INDEX.sh` in the array's folder sets `run` and `command` of each."""

    indices: Sequence[int]
    """Numbers of the elements, rising."""
    max_at_once: int | None = None
    """Number of elements that run at a time; None is no limit."""

    def __str__(self) -> str:
        limit = "" if self.max_at_once is None else f"%{self.max_at_once}"
        first, last = self.indices[0], self.indices[-1]
        if last - first + 1 == len(self.indices) > 1 or len(self.indices) == 1:
            return f"{first}-{last}{limit}"
        return f"{','.join(map(str, self.indices))}{limit}"


@dataclass(frozen=True)
class BatchJob:
    """One run, or an array of runs, as a job of Slurm."""

    name: str
    profile: ClusterProfile
    nodes: int
    run_dir: Path
    """Run folder, or the array's folder; absolute."""
    work_dir: Path
    """Folder that paths in the config are relative to; absolute."""
    python: str
    """Python of the machine that submits, used unless the profile names one."""
    time: str | None = None
    """Time limit; None is the profile's, and without one the partition's."""
    chained: bool = False
    """Whether further jobs continue the run, instead of a requeue of this one."""
    staged: bool = False
    """Whether data sets are copied to the nodes first."""
    array: Array | None = None
    """Elements of an array, which neither checks its nodes nor copies data sets; None is one run."""

    @property
    def ranks(self) -> int:
        """Processes of the run."""
        return self.nodes * self.profile.ranks

    @property
    def log(self) -> str:
        """Path of the log, with `%j`, or `%A_%a`, where the job's number goes."""
        return f"{str(self.run_dir).replace('%', '%%')}/logs/{'%A_%a' if self.array else '%j'}.log"


def render(job: BatchJob) -> str:
    """Write the batch script of a job."""
    profile = job.profile
    lead = {"signal_lead_s": str(profile.signal_lead_s)}
    parts = lead | {
        "directives": _lines(f"#SBATCH {option}" for option in _directives(job)),
        "identity": _lines(_identity(job)),
        "max_failures": str(profile.max_failures),
        **_setup(profile, lead),
        "environment": _lines(f"export {name}={_shell(value)}" for name, value in _environment(job).items()),
        "step": _words(_step(job)),
        "python": _words(_python(job)),
        "again": _template("chain.sh" if job.chained else "requeue.sh").rstrip(),
        "prepare": _lines(_prepare(job)),
        "launch": _launch(job),
    }
    return fill(_template("job.sbatch"), parts)


def _setup(profile: ClusterProfile, lead: Mapping[str, str]) -> dict[str, str]:
    """Write the lines of the setup, and those that end it before the time limit does; nothing if there is none."""
    lines = [*(f"module load {shlex.quote(module)}" for module in profile.modules), *profile.setup]
    around = {
        "guard": fill(_template("guard.sh"), lead).rstrip(),
        "begin_setup": 'echo "$BASHPID" >"$run/.setup"',
        "end_setup": 'rm -f "$run/.setup"',
        "start_guard": 'rm -f "$run/.setup"\nguard &\nguard=$!\ndisown',
        "stop_guard": 'kill "$guard" 2>/dev/null\n[ $rc != 140 ] || what="time limit during the setup"',
    }
    return {"setup": _lines(lines)} | (around if lines else dict.fromkeys(around, ""))


def fill(template: str, parts: Mapping[str, str]) -> str:
    """Put parts in the place of `@name@`; a line of one empty part vanishes."""
    lines = []
    for line in template.splitlines():
        alone = _PLACEHOLDER.fullmatch(line)
        if not (alone and not parts[alone[1]]):
            lines.append(_PLACEHOLDER.sub(lambda match: parts[match[1]], line))
    return "\n".join(lines) + "\n"


def _template(name: str) -> str:
    return (shipped_folder("slurm") / name).read_text(encoding="utf-8")


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def _words(words: Iterable[str]) -> str:
    """Write the words of an array of the shell, each on a line of its own if they are long together."""
    together = " ".join(words := list(words))
    return together if len(together) < _LONG else "\n  " + "\n  ".join(words) + "\n"


def _directives(job: BatchJob) -> Iterator[str]:
    """List the options of sbatch."""
    profile = job.profile
    gpus = [profile.gpu_type, str(profile.gpus_per_node)] if profile.gpus_per_node else []
    options = {
        "job-name": job.name,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "nodes": job.nodes,
        "ntasks-per-node": _tasks_per_node(profile),
        "cpus-per-task": _cpus_per_task(profile),
        "gpus-per-node": ":".join(filter(None, gpus)),
        "mem": profile.mem,
        "time": job.time or profile.time,
        "array": job.array,
        "signal": f"USR1@{profile.signal_lead_s}",
        "chdir": job.work_dir,
        "output": job.log,
        "open-mode": "append",
    }
    for name, value in options.items():
        if value:
            yield f"--{name}={_directive(str(value))}"
    if profile.exclusive:
        yield "--exclusive"
    yield "--no-requeue" if job.chained else "--requeue"
    yield from profile.sbatch


def _tasks_per_node(profile: ClusterProfile) -> int:
    return 1 if profile.launcher == "torchrun" else profile.ranks


def _cpus_per_task(profile: ClusterProfile) -> int | None:
    return profile.cpus_per_node and profile.cpus_per_node // _tasks_per_node(profile)


def _directive(value: str) -> str:
    """Quote a value as sbatch reads it in a script."""
    if _PLAIN.fullmatch(value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _shell(value: str) -> str:
    """Quote a value for the shell; variables in it are left for the shell to fill in."""
    return value if _PLAIN.fullmatch(value) else '"' + re.sub(r'([\\"`])', r"\\\1", value) + '"'


def _identity(job: BatchJob) -> Iterator[str]:
    """List the lines that say which run and which job this is."""
    if job.array is None:
        yield f"run={shlex.quote(str(job.run_dir))}"
        yield "job=$SLURM_JOB_ID"
    else:
        yield f"array={shlex.quote(str(job.run_dir))}"
        yield 'source "$array/elements/$SLURM_ARRAY_TASK_ID.sh"  # sets run and command'
        yield "job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID  # SLURM_JOB_ID of the last one is the whole array"


def _prepare(job: BatchJob) -> Iterator[str]:
    """List the steps before the ranks start; each has to succeed."""
    if job.array is not None:
        return
    if job.profile.preflight != "off":
        drain = " --drain" if job.profile.preflight == "drain" else ""
        check = f'-m hopescale node check "$run/config.yaml" --run-dir "$run"{drain}'
        yield f'"${{step[@]}}" "${{python[@]}}" {check} &&'
    if job.staged:
        one = '--ntasks="$SLURM_NNODES" --ntasks-per-node=1'
        yield f'"${{step[@]}}" {one} "${{python[@]}}" -m hopescale node stage "$run/config.yaml" &&'


def _environment(job: BatchJob) -> dict[str, str]:
    """Return what the ranks find in their environment besides what is there already.

    PYTHONSAFEPATH keeps the working directory, which may be a checkout, from coming before the copy of the code.
    """
    profile = job.profile
    threads = {"OMP_NUM_THREADS": str(profile.cpus_per_node // profile.ranks)} if profile.cpus_per_node else {}
    code = {"PYTHONPATH": f"${'array' if job.array else 'run'}/code", "PYTHONSAFEPATH": "1"}
    return {**code, **threads, **profile.env}


def _step(job: BatchJob) -> Iterator[str]:
    """List srun and its options, for every step of the job.

    The first task that ends leaves the others a minute. Ending them at once would put their exit codes before its own.
    """
    profile, cpus = job.profile, _cpus_per_task(job.profile)
    yield from ("srun", "--export=ALL", "--label", "--kill-on-bad-exit=0", "--wait=60")
    if cpus is not None:
        yield f"--cpus-per-task={cpus}"
    if profile.container == "pyxis":
        yield f"--container-image={_shell(profile.image)}"
        yield f"--container-mounts={','.join(_mounts(job))}"
        yield f"--container-workdir={shlex.quote(str(job.work_dir))}"
        yield f"--container-env={','.join(_environment(job))}"
    yield from profile.srun


def _python(job: BatchJob) -> Iterator[str]:
    """List the words that run Python on a node."""
    profile = job.profile
    if profile.container == "apptainer":
        yield from ("apptainer", "exec", *(["--nv"] if profile.gpus_per_node else []))
        yield from (f"--bind={','.join(_mounts(job))}", f"--pwd={shlex.quote(str(job.work_dir))}")
        yield _shell(profile.image)
    outside = shlex.quote(job.python) if profile.container == "none" else "python"
    yield _shell(profile.python) if profile.python else outside
    yield "-u"


def _mounts(job: BatchJob) -> list[str]:
    same = dict.fromkeys(shlex.quote(f"{path}:{path}") for path in (job.work_dir, job.run_dir))
    return [*same, *map(_shell, job.profile.mounts)]


def _launch(job: BatchJob) -> str:
    """Write the command that runs the ranks."""
    command = '"${command[@]}"' if job.array else 'train "$run/config.yaml" --run-dir "$run" --resume auto'
    if job.profile.launcher == "srun":
        return f'"${{step[@]}}" "${{python[@]}}" -m hopescale {command}'
    return f"""\
"${{step[@]}}" "${{python[@]}}" -m torch.distributed.run \\
  --nnodes="$SLURM_NNODES" --nproc-per-node={job.profile.ranks} --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" \\
  --rdzv-endpoint="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((15000 + SLURM_JOB_ID % 10000))" \\
  --signals-to-handle={_TORCHRUN_SIGNALS} --shutdown-timeout={_SHUTDOWN_TIMEOUT_S} \\
  -m hopescale {command}"""
