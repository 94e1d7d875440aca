"""`jobs.jsonl` of a folder: the jobs that were submitted for it, one a line."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path

from hopescale.launch.scheduler import Slurm

JOBS = "jobs.jsonl"


@dataclass(frozen=True)
class LedgerEntry:
    """One submission."""

    job: str
    """Number of the job; `4220_3` for an element of an array."""
    submitted: str
    """Time, with its zone."""
    cluster: str
    """Name of the profile."""
    nodes: int
    ranks: int
    script: str
    """Path of the batch script, relative to the folder."""
    log: str
    elements: tuple[tuple[str, str], ...] = ()
    """Name and run folder of each element of an array, in the order of their indices."""


def note(folder: Path, entry: LedgerEntry) -> None:
    """Add a line; one that a kill or a full disk has torn ends before it."""
    content = {name: value for name, value in asdict(entry).items() if name != "elements" or value}
    path = folder / JOBS
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as stream:
        stream.write("\n" * torn + f"{json.dumps(content)}\n")


def entries(folder: Path) -> list[LedgerEntry]:
    """Return the submissions of a folder, oldest first; a line that is torn, or no submission, is left out."""
    try:
        lines = (folder / JOBS).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    names, known = {field.name for field in fields(LedgerEntry)}, []
    for line in lines:
        try:
            content = {name: value for name, value in json.loads(line).items() if name in names}
            known.append(LedgerEntry(**content | {"elements": tuple(map(tuple, content.get("elements", ())))}))
        except (ValueError, AttributeError, TypeError):
            continue
    return known


def now() -> str:
    """Return the time as entries hold it."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def forget_outcome(folder: Path) -> None:
    """Forget how earlier jobs of a run ended: a new submission has all its tries."""
    for name in ("outcome", "failures"):
        (folder / name).unlink(missing_ok=True)


def submit_again(folder: Path, entry: LedgerEntry, slurm: Slurm) -> LedgerEntry:
    """Submit the script of an earlier job once more, of an array the one element; return and note the new entry.

    Raises:
        LaunchError: If it is refused.
    """
    element = entry.job.partition("_")[2]
    id = slurm.submit(folder / entry.script, *([f"--array={element}"] if element else []))
    forget_outcome(folder)
    job = f"{id}_{element}" if element else id
    log = str(Path(entry.log).with_name(f"{job}.log"))
    again = replace(entry, job=job, submitted=now(), log=log)
    note(folder, again)
    return again
