"""What a cluster is like: one YAML file per cluster, read once, the same for every run."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from hopescale.common.errors import ConfigError, Problem
from hopescale.common.paths import display_path, shipped_folder
from hopescale.config.load import load_settings

_VARIABLE = re.compile(r"[A-Za-z_]\w*")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
_PLACEHOLDER = "YOUR_"
"""Beginning of a value in a shipped profile that no cluster has."""
_QUOTED = {"time": 'write it in quotes: "12:00:00"', "preflight": 'write it in quotes: "off"'}
"""Hints for values that YAML reads differently: an unquoted 12:00:00 as the number 43200, `off` as false."""


@dataclass(frozen=True)
class ClusterProfile:
    """Settings of a cluster: what is the same for every job there."""

    name: str = ""
    """Name of the cluster in lists and messages; the file's name unless set."""
    partition: str | None = None
    """Partition; null is the cluster's default."""
    account: str | None = None
    """Account that is charged."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features a node must have, as of `--constraint`."""
    gpus_per_node: int = 8
    """GPUs to ask for on each node; 0 asks for none."""
    gpu_type: str | None = None
    """Type of these GPUs, where the cluster has several."""
    ranks_per_node: int | None = None
    """Processes of a run on each node; null is one per GPU."""
    cpus_per_node: int | None = None
    """CPUs to ask for on each node, shared out evenly among its ranks, each with as many threads. Null leaves both to
    the cluster."""
    mem: str | None = None
    """Memory to ask for on each node, as of `--mem`; "0" is all of it."""
    exclusive: bool = False
    """Whether no other job may run on the nodes."""
    time: str | None = None
    """Time limit where `--time` does not give one, as of sbatch: minutes, `hours:minutes:seconds` or `days-hours`, in
    quotes."""
    signal_lead_s: int = 180
    """Seconds before the time limit at which a run is told to save and stop; more than a step and a checkpoint take."""
    max_failures: int = 3
    """Failures in a row, without a newer checkpoint in between, after which a job is started again no more."""
    launcher: Literal["srun", "torchrun"] = "srun"
    """Who starts the ranks: `srun` one task per rank, `torchrun` one task per node, which starts that node's."""
    python: str | None = None
    """Python that runs hopescale; null is the one that submits, or `python` of the container."""
    container: Literal["none", "pyxis", "apptainer"] = "none"
    """What the ranks run in."""
    image: str | None = None
    """The container's image."""
    mounts: tuple[str, ...] = ()
    """`SOURCE:TARGET` to mount in the container, besides the working directory and the run folder."""
    modules: tuple[str, ...] = ()
    """Modules to load."""
    setup: tuple[str, ...] = ()
    """Lines of shell to run on the first node before the ranks start."""
    preflight: Literal["off", "warn", "drain"] = "off"
    """Whether the nodes are checked before the ranks start: `warn` names bad ones in the log and goes on, `drain` puts
    the job back into the queue without them."""
    local_disk: str | None = None
    """Folder on each node's own disk: data sets are copied there before the ranks start, and read there. Variables in
    it are filled in on the node, as in `$TMPDIR`."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment variables of the ranks, as those of NCCL."""
    sbatch: tuple[str, ...] = ()
    """Further options of sbatch."""
    srun: tuple[str, ...] = ()
    """Further options of srun."""

    @property
    def ranks(self) -> int:
        """Processes of a run on each node."""
        return self.gpus_per_node if self.ranks_per_node is None else self.ranks_per_node


def load_profile(cluster: str, *, example: bool = False) -> ClusterProfile:
    """Read and check a profile.

    Args:
        cluster: A path, or the name of a shipped profile.
        example: Whether it may hold the values that a shipped profile leaves to whoever copies it.

    Raises:
        ConfigError: With everything that is wrong with it, or the names of shipped profiles if there is none.
    """
    path = _find(cluster)
    try:
        profile = load_settings(path, ClusterProfile)
    except ConfigError as error:
        problems = [replace(problem, hint=_QUOTED.get(problem.key, problem.hint)) for problem in error.problems]
        raise ConfigError(problems) from None
    origin = display_path(path)
    problems = [Problem(key, message, origin, hint) for key, message, hint in _problems(profile)]
    if problems := problems + ([] if example else list(_placeholders(profile, path))):
        raise ConfigError(problems)
    return profile if profile.name else replace(profile, name=path.stem)


def seconds_of(time: str) -> int | None:
    """Return the seconds of a time limit as sbatch reads it; None if it is none."""
    match = _TIME.fullmatch(time)
    if not match:
        return None
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = [*parts, 0, 0][:3]
        return ((int(match["days"]) * 24 + hours) * 60 + minutes) * 60 + seconds
    hours, minutes, seconds = parts if len(parts) == 3 else (0, *parts, 0)[:3]
    return (hours * 60 + minutes) * 60 + seconds


def _find(cluster: str) -> Path:
    shipped = shipped_folder("slurm") / "clusters"
    for path in (Path(cluster), shipped / f"{cluster}.yaml"):
        if path.is_file():
            return path
    names = sorted(path.stem for path in shipped.glob("*.yaml"))
    close = difflib.get_close_matches(Path(cluster).name.removesuffix(".yaml"), names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"write one, as the shipped ones: {', '.join(names)}"
    raise ConfigError([Problem(cluster, "no such profile of a cluster, neither a file nor a shipped one", hint=hint)])


def _placeholders(profile: ClusterProfile, path: Path) -> Iterator[Problem]:
    """Yield a problem per setting that a shipped profile leaves to whoever copies it, with its line in the file."""
    file, lines = display_path(path), path.read_text().splitlines()
    is_shipped = path.parent == shipped_folder("slurm") / "clusters"
    hint = f"copy {file}, write what your cluster has, and name the copy" if is_shipped else "put your own value there"
    for name, value in vars(profile).items():
        for held in [value] if isinstance(value, str) else value if isinstance(value, tuple) else []:
            if _PLACEHOLDER in held:
                line = next((f", line {n}" for n, line in enumerate(lines, 1) if held in line), "")
                yield Problem(name, f"{held} is a placeholder", f"{file}{line}", hint)


def _problems(profile: ClusterProfile) -> Iterator[tuple[str, str, str | None]]:
    """List what is wrong with a profile: key, message and hint."""
    lowest = {"gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_node": 1, "signal_lead_s": 1, "max_failures": 0}
    for key, low in lowest.items():
        value = getattr(profile, key)
        if value is not None and value < low:
            yield key, f"must be at least {low}, is {value}", None
    gpus, ranks = profile.gpus_per_node, profile.ranks_per_node
    if gpus == 0 and ranks is None:
        yield "ranks_per_node", "must be set where gpus_per_node is 0", "ranks_per_node: 2, for instance"
    if ranks is not None and 0 < gpus < ranks:
        yield "ranks_per_node", f"is {ranks}, but a node has gpus_per_node: {gpus}", "one rank per GPU at most"
    if profile.gpu_type is not None and gpus == 0:
        yield "gpu_type", f"is {profile.gpu_type}, but gpus_per_node is 0", "leave one out"
    if profile.cpus_per_node is not None and 0 < profile.cpus_per_node < profile.ranks:
        yield "cpus_per_node", f"is {profile.cpus_per_node}, fewer than the {profile.ranks} ranks of a node", None
    if profile.container == "none":
        for key in ("image", "mounts"):
            if getattr(profile, key):
                yield key, "has no effect with container: none", "set container to pyxis or apptainer"
    elif profile.image is None:
        yield "image", f"must be set with container: {profile.container}", None
    if profile.time is not None and seconds_of(profile.time) is None:
        yield "time", f"{profile.time!r} is no time limit", "write minutes, hours:minutes:seconds or days-hours"
    for name in profile.env:
        if not _VARIABLE.fullmatch(name):
            yield f"env.{name}", "no name of an environment variable", None
