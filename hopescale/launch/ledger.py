"""`jobs.jsonl` of a folder: the jobs that were submitted for it, one a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path

from hopescale.common.disk import is_locked, locked
from hopescale.common.errors import LaunchError
from hopescale.launch.scheduler import Slurm

JOBS = "jobs.jsonl"
_LOCK = ".submit"
_COUNTS, _TEXTS = ("nodes", "ranks", "inode"), ("job", "submitted", "cluster", "script", "log", "folder")


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
    folder: str = ""
    """Folder in whose file the line was written, absolute; empty if an older version wrote it."""
    inode: int = 0
    """Number of that folder in its file system, which it keeps when it is moved; 0 if an older version wrote it."""


def note(folder: Path, entry: LedgerEntry) -> None:
    """Add a line; one that a kill or a full disk has torn ends before it."""
    content = {name: value for name, value in asdict(entry).items() if name != "elements" or value}
    content |= {"folder": str(folder.absolute()), "inode": folder.stat().st_ino}
    path = folder / JOBS
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as stream:
        stream.write("\n" * torn + f"{json.dumps(content)}\n")


def entries(folder: Path) -> list[LedgerEntry]:
    """Return the submissions of a folder, oldest first.

    A line that is torn, or is no submission, is left out, and so are the lines of a folder of which this is a copy.
    """
    return [entry for entry in _read(folder) if not _is_copied(entry, folder)]


def copied_from(folder: Path) -> str | None:
    """Return the folder of which this one is a copy, so that its `jobs.jsonl` names jobs of another; None if none."""
    return next((entry.folder for entry in _read(folder) if _is_copied(entry, folder)), None)


@contextmanager
def submitting(folder: Path) -> Iterator[None]:
    """Keep other processes from submitting jobs of a folder, from the check to the note; makes the folder.

    Raises:
        LaunchError: If another process is submitting, or the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / _LOCK))
        except BlockingIOError as error:
            raise _submitted_elsewhere(folder) from error
        except OSError as error:
            raise LaunchError(f"cannot write {folder}: {error.strerror}", "choose another folder") from error
        yield


def require_not_submitting(folder: Path) -> None:
    """Refuse a folder that another process is submitting, and that is half written as yet. Writes nothing.

    Raises:
        LaunchError: If there is such a process.
    """
    if is_locked(folder / _LOCK):
        raise _submitted_elsewhere(folder)


def _submitted_elsewhere(folder: Path) -> LaunchError:
    hint = f"look with `hopescale jobs status {folder}` what came of it"
    return LaunchError(f"another process is submitting {folder} at this moment", hint)


def _read(folder: Path) -> list[LedgerEntry]:
    try:
        lines = (folder / JOBS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [entry for line in lines if (entry := _entry(line)) is not None]


def _entry(line: str) -> LedgerEntry | None:
    try:
        content = json.loads(line)
        content = {field.name: content[field.name] for field in fields(LedgerEntry) if field.name in content}
        content["elements"] = tuple((str(name), str(run)) for name, run in content.get("elements", ()))
        entry = LedgerEntry(**content)
    except (ValueError, TypeError):
        return None
    kinds: dict[type, tuple[str, ...]] = {str: _TEXTS, int: _COUNTS}
    right = (isinstance(getattr(entry, name), kind) for kind, names in kinds.items() for name in names)
    return entry if all(right) else None


def _is_copied(entry: LedgerEntry, folder: Path) -> bool:
    """Tell whether this line was written in another folder than this one, which may have been moved since.

    A line without the folder's number is a copy if the other folder has it too: one that was moved leaves none behind.
    """
    if not entry.folder or Path(entry.folder) == folder.absolute():
        return False
    if entry.inode:
        return entry.inode != folder.stat().st_ino
    other = Path(entry.folder) / JOBS
    try:
        return not other.samefile(folder / JOBS) and any(entry == known for known in _read(other.parent))
    except OSError:
        return False


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
        LaunchError: If it is refused, or the folder was moved since, which the script does not know.
    """
    if entry.folder and Path(entry.folder).resolve() != folder.resolve():
        message = f"{folder} was {entry.folder} when job {entry.job} was submitted, and its script says so"
        raise LaunchError(message, "submit it with `hopescale submit`")
    element = entry.job.partition("_")[2]
    id = slurm.submit(folder / entry.script, *([f"--array={element}"] if element else []))
    forget_outcome(folder)
    job = f"{id}_{element}" if element else id
    log = str(Path(entry.log).with_name(f"{job}.log"))
    again = replace(entry, job=job, submitted=now(), log=log)
    note(folder, again)
    return again
