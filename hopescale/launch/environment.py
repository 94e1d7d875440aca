"""The environment variables by which a launcher tells a process its place. The only place that reads or makes them."""

from __future__ import annotations

import itertools
import re
import socket
from collections.abc import Iterator, Mapping

from hopescale.common.errors import LaunchError
from hopescale.common.rank_info import RankInfo

_FIRST_PORT, _NUM_PORTS = 15_000, 10_000
"""Ports that jobs of Slurm are spread over by their number."""

_FIRST_SPECIAL_STEP = -16
"""Steps of Slurm from this number on, of 32 bits, launch no ranks: the batch script, an interactive shell."""

_BRACKETS = re.compile(r"\[([^\[\]]+)\]")
"""Numbers of hosts in a list of Slurm."""

_SIGNS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_PROCID")
"""Variables that show that a launcher is at work."""


def find_rank_info(environ: Mapping[str, str]) -> RankInfo | None:
    """Return this process's place as torchrun or, after that, srun states it; None for a process started alone.

    A batch script and an interactive allocation hold Slurm's variables too, but start one process: they count as alone.

    Raises:
        LaunchError: If the variables of a launcher are incomplete or make no sense.
    """
    if "RANK" in environ or "LOCAL_RANK" in environ:
        return _torchrun_rank_info(environ)
    if _is_task_of_a_step(environ):
        return _srun_rank_info(environ)
    if environ.get("WORLD_SIZE", "1") != "1":
        return _torchrun_rank_info(environ)
    return None


def child_environ(environ: Mapping[str, str], rank_info: RankInfo, num_threads: int) -> dict[str, str]:
    """Return the environment of a process that is to find `rank_info` in it; a number of threads set there stays."""
    return {
        "OMP_NUM_THREADS": str(num_threads),
        **environ,
        "RANK": str(rank_info.rank),
        "WORLD_SIZE": str(rank_info.world_size),
        "LOCAL_RANK": str(rank_info.local_rank),
        "MASTER_ADDR": rank_info.address,
        "MASTER_PORT": str(rank_info.port),
    }


def find_node(environ: Mapping[str, str]) -> str:
    """Return the name of this node: Slurm's, which its commands take, else the machine's."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def find_nodes(environ: Mapping[str, str]) -> list[str]:
    """Return the names of all nodes of this process's job step, in the order of their ranks; itself without Slurm.

    Raises:
        LaunchError: If Slurm's list cannot be read.
    """
    name = _nodes_name(environ)
    return list(_hosts(environ[name], name)) if environ.get(name) else [find_node(environ)]


def _torchrun_rank_info(environ: Mapping[str, str]) -> RankInfo:
    world_size = _number(environ, "WORLD_SIZE", 1)
    return RankInfo(
        rank=_number(environ, "RANK", 0, world_size),
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK", 0, world_size),
        address=_text(environ, "MASTER_ADDR"),
        port=_number(environ, "MASTER_PORT", 1, 2**16),
    )


def _is_task_of_a_step(environ: Mapping[str, str]) -> bool:
    if "SLURM_STEP_ID" not in environ or _tasks_name(environ) not in environ:
        return False
    step = _number(environ, "SLURM_STEP_ID", _FIRST_SPECIAL_STEP)
    return 0 <= step < 2**32 + _FIRST_SPECIAL_STEP and _number(environ, _tasks_name(environ), 1) > 1


def _tasks_name(environ: Mapping[str, str]) -> str:
    """Return the variable that counts the ranks.

    A batch script submitted from within a step inherits that step's variables; Slurm sets only those of the job anew.
    """
    return "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"


def _srun_rank_info(environ: Mapping[str, str]) -> RankInfo:
    world_size = _number(environ, _tasks_name(environ), 1)
    nodes = _nodes_name(environ)
    if "MASTER_PORT" in environ:
        port = _number(environ, "MASTER_PORT", 1, 2**16)
    else:
        port = _FIRST_PORT + _number(environ, "SLURM_JOB_ID", 0) % _NUM_PORTS
    return RankInfo(
        rank=_number(environ, "SLURM_PROCID", 0, world_size),
        world_size=world_size,
        local_rank=_number(environ, "SLURM_LOCALID", 0, world_size),
        address=environ.get("MASTER_ADDR") or next(_hosts(_text(environ, nodes), nodes)),
        port=port,
        bound=True,
    )


def _nodes_name(environ: Mapping[str, str]) -> str:
    return "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in environ else "SLURM_JOB_NODELIST"


def _hosts(hosts: str, name: str) -> Iterator[str]:
    """List the hosts that Slurm writes as `node[01-03,07],gpu5`: `node01`, `node02`, `node03`, `node07`, `gpu5`."""
    for part in re.split(r",(?![^\[\]]*\])", hosts):
        choices = [[text] if number % 2 == 0 else _range(text) for number, text in enumerate(_BRACKETS.split(part))]
        for pieces in itertools.product(*choices):
            host = "".join(pieces)
            if not re.fullmatch(r"[\w.-]+", host):
                hint = "set MASTER_ADDR to the host of rank 0"
                raise LaunchError(f"{name} is {hosts!r}, which names no host", hint)
            yield host


def _range(text: str) -> list[str]:
    """List the numbers of `01-03,07`, as wide as they are written."""
    values: list[str] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if dash and first.isdigit() and last.isdigit():
            values += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        else:
            values.append(part)
    return values


def _text(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        problem = "is empty" if name in environ else "is not set"
        beside = ", ".join(f"{other} is {environ[other]!r}" for other in _SIGNS if environ.get(other))
        message = f"{name} {problem}, but a launcher has started this process: {beside}"
        raise LaunchError(message, "start all ranks with --nproc, torchrun or srun; to run alone, unset the others")
    return environ[name]


def _number(environ: Mapping[str, str], name: str, low: int, end: int | None = None) -> int:
    text = _text(environ, name)
    number = int(text) if re.fullmatch(r"-?\d+", text, re.ASCII) else None
    if number is None or number < low or (end is not None and number >= end):
        bounds = f"at least {low}" if end is None else f"from {low} to {end - 1}"
        hint = "the launcher sets it, or an export in the script that starts it"
        raise LaunchError(f"{name} is {text!r}, must be a number {bounds}", hint)
    return number
