"""Many runs as throttled arrays of jobs: each element survives as a job of its own does."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hopescale.common.disk import replace_text
from hopescale.common.errors import LaunchError
from hopescale.launch.ledger import LedgerEntry, forget_outcome, note, now, submitting
from hopescale.launch.profile import ClusterProfile
from hopescale.launch.sbatch import Array, BatchJob, render
from hopescale.launch.scheduler import Slurm
from hopescale.launch.snapshot import take_snapshot
from hopescale.launch.status import run_status
from hopescale.launch.submit import check_cluster
from hopescale.observe.run_folder import require_own
from hopescale.observe.run_status import DONE, FAILED


@dataclass(frozen=True)
class Element:
    """One run of an array."""

    name: str
    run_dir: Path
    command: tuple[str, ...]
    """Words after `hopescale`, as in `train CONFIG --run-dir RUN`; one that is started again has to continue."""


@dataclass(frozen=True)
class Stage:
    """Elements that may start at the same time, by their numbers."""

    elements: Mapping[int, Element]
    after: int | None = None
    """Place of the stage whose elements of the same numbers have to end first; None waits for nothing."""


def submit_array(
    elements: Sequence[Element],
    profile: ClusterProfile,
    folder: Path,
    *,
    nodes: int = 1,
    max_at_once: int | None = None,
    time: str | None = None,
    only: Literal["failed"] | None = None,
    slurm: Slurm | None = None,
) -> list[str]:
    """Submit runs as an array, or as several where the cluster takes none so large; runs that are done stay out.

    Each array has a folder of its own, `array-1`, `array-2` and so on, with the script, a file per element, a copy of
    the package and the logs; `jobs.jsonl` of `folder` and of each run folder names the jobs. Commands run in the
    working directory of whoever submits.

    Args:
        elements: Runs to submit.
        profile: Profile of the cluster.
        folder: Folder of the arrays' folders.
        nodes: Nodes of each element.
        max_at_once: Number of elements of an array that run at a time; None is no limit.
        time: Time limit of each element; None is the profile's.
        only: `failed` leaves out all that have not failed.
        slurm: Slurm; None is the one of this machine.

    Returns:
        Numbers of the jobs; none if nothing is left to run.

    Raises:
        ConfigError: If the cluster would refuse them, or let them wait for ever.
        LaunchError: If an element is waiting or running and was not left out, a folder cannot be written or holds files
            of somebody else's, another process is submitting, or Slurm refuses.
    """
    slurm = slurm or Slurm()
    with submitting(folder):
        rest, ids = _choose(elements, only, slurm), []
        common, size = _common(profile, folder, nodes, time, slurm)
        for start in range(0, len(rest), size):
            part = dict(enumerate(rest[start : start + size]))
            ids.append(_submit(part, replace(common, array=Array(range(len(part)), max_at_once)), folder, slurm))
        return ids


def require_no_jobs(run_dirs: Iterable[Path], why: str, slurm: Slurm | None = None) -> None:
    """Check that no job of these run folders waits or runs.

    Raises:
        LaunchError: If one does. `why` says why it must not.
    """
    for run_dir in run_dirs:
        status = run_status(run_dir, slurm or Slurm())
        if status.job is not None and status.job.live:
            hint = f"wait for it, or end it with `hopescale jobs cancel {run_dir}`"
            raise LaunchError(f"{run_dir.name} is {status.state} as job {status.job.id}, and {why}", hint)


def submit_stages(
    stages: Sequence[Stage],
    profile: ClusterProfile,
    folder: Path,
    *,
    nodes: int = 1,
    max_at_once: int | None = None,
    time: str | None = None,
    slurm: Slurm | None = None,
) -> list[str]:
    """Submit arrays whose elements wait until those of the same number in an earlier one have ended well.

    A run may have elements in several stages. One whose predecessor fails is removed from the queue by Slurm.

    Args:
        stages: Stages, each after the one that it waits for; what is done is not among their elements.
        profile: Profile of the cluster.
        folder: Folder of the arrays' folders, as of `submit_array`.
        nodes: Nodes of each element.
        max_at_once: Number of elements of an array that run at a time; None is no limit.
        time: Time limit of each element; None is the profile's.
        slurm: Slurm; None is the one of this machine.

    Returns:
        Numbers of the jobs; none if nothing is left to run.

    Raises:
        ConfigError: If the cluster would refuse them, or let them wait for ever.
        LaunchError: Failures that `submit_array` names. Arrays that were taken before stay in the queue.
    """
    slurm = slurm or Slurm()
    with submitting(folder):
        runs = {element.run_dir: element for stage in stages for element in stage.elements.values()}
        left = {element.run_dir for element in _choose(runs.values(), None, slurm)}
        common, size = _common(profile, folder, nodes, time, slurm)
        ids: list[str] = []
        job_of: dict[tuple[int, int], str] = {}
        for begin in range(0, 1 + max((max(stage.elements, default=-1) for stage in stages), default=-1), size):
            for number, stage in enumerate(stages):
                parts: dict[str | None, dict[int, Element]] = {}
                for place in sorted(stage.elements):
                    if begin <= place < begin + size and stage.elements[place].run_dir in left:
                        before = None if stage.after is None else job_of.get((stage.after, place))
                        parts.setdefault(before, {})[place - begin] = stage.elements[place]
                for before, part in parts.items():
                    job = replace(common, array=Array(list(part), max_at_once))
                    ids.append(_submit(part, job, folder, slurm, after=before))
                    job_of |= {(number, begin + place): ids[-1] for place in part}
        return ids


def _common(profile: ClusterProfile, folder: Path, nodes: int, time: str | None, slurm: Slurm) -> tuple[BatchJob, int]:
    """Return what the arrays of a folder share, and the size that none may exceed, after a look at the cluster."""
    if (size := slurm.max_array_size()) == 0:
        raise LaunchError("this cluster takes no arrays: its MaxArraySize is 0", "submit each run as a job of its own")
    common = BatchJob(folder.name, profile, nodes, folder.absolute(), Path.cwd(), sys.executable, time)
    check_cluster(common, slurm)
    return common, size


def _submit(
    elements: Mapping[int, Element], common: BatchJob, folder: Path, slurm: Slurm, *, after: str | None = None
) -> str:
    """Submit one array, each element of which waits for that of its number in the array `after`; return its number."""
    wait = [] if after is None else [f"--dependency=aftercorr:{after}", "--kill-on-invalid-dep=yes"]
    try:
        job = replace(common, run_dir=_next_folder(common.run_dir))
        script = _write(elements, job)
        id = slurm.submit(script, *wait)
        _note(elements, job, id, script, folder)
    except OSError as error:
        raise LaunchError(f"cannot write {error.filename or folder}: {error.strerror}") from error
    return id


def _choose(elements: Iterable[Element], only: str | None, slurm: Slurm) -> list[Element]:
    rest = []
    for element in elements:
        status = run_status(element.run_dir, slurm)
        if only == FAILED:
            if status.state == FAILED:
                rest.append(element)
        elif status.job is not None and status.job.live:
            hint = f"wait for it, end it with `hopescale jobs cancel {element.run_dir}`, or submit failed ones only"
            raise LaunchError(f"{element.name} is {status.state} as job {status.job.id}", hint)
        elif status.state != DONE:
            rest.append(element)
    for element in rest:
        require_own(element.run_dir, f"the run folder of {element.name},")
    return rest


def _next_folder(folder: Path) -> Path:
    numbers = [int(path.name.removeprefix("array-")) for path in folder.glob("array-*") if path.name[6:].isdigit()]
    return folder / f"array-{max(numbers, default=0) + 1}"


def _write(elements: Mapping[int, Element], job: BatchJob) -> Path:
    """Write the folder of one array; return its script."""
    for name in ("elements", "logs"):
        (job.run_dir / name).mkdir(parents=True)
    for index, element in elements.items():
        element.run_dir.mkdir(parents=True, exist_ok=True)
        forget_outcome(element.run_dir)
        run, command = shlex.quote(str(element.run_dir.absolute())), " ".join(map(shlex.quote, element.command))
        replace_text(job.run_dir / "elements" / f"{index}.sh", f"# {element.name}\nrun={run}\ncommand=({command})\n")
    take_snapshot(job.run_dir / "code")
    script = job.run_dir / "submit.sbatch"
    replace_text(script, render(job))
    return script


def _note(elements: Mapping[int, Element], job: BatchJob, id: str, script: Path, folder: Path) -> None:
    """Note the array in its folder, and each element in its run folder."""
    common = {"submitted": now(), "cluster": job.profile.name, "nodes": job.nodes, "ranks": job.ranks}
    runs = tuple((element.name, str(element.run_dir.absolute())) for element in elements.values())
    logs = job.run_dir / "logs"
    within = str(script.relative_to(folder.absolute()))
    note(folder, LedgerEntry(id, script=within, log=str(logs), elements=runs, **common))
    for index, element in elements.items():
        log = str(logs / f"{id}_{index}.log")
        note(element.run_dir, LedgerEntry(f"{id}_{index}", script=str(script), log=log, **common))
