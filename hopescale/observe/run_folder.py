"""Which folders are hopescale's to write in: new ones, empty ones, and those that hold a run or a sweep already."""

from __future__ import annotations

from pathlib import Path

from hopescale.common.errors import LaunchError

MARKS = ("origins.json", "trial.json", "jobs.jsonl", "checkpoints/latest", "checkpoints/step-*", "checkpoints/run")
"""Files that only hopescale writes into a run folder: a start, a sweep, a submission, a conversion, a mirror."""

SWEEP_MARKS = ("trials",)
"""The same of a sweep's folder."""

_NAMED = 4


def require_own(folder: Path, option: str, marks: tuple[str, ...] = MARKS, also: tuple[Path, ...] = ()) -> None:
    """Refuse a folder with files of somebody else's, which could be replaced. Hidden ones stay. Writes nothing.

    Args:
        folder: Folder to write in; need not exist.
        option: Option that names it, or words that do, for the message.
        marks: Patterns; a folder of ours matches one of them.
        also: Files that may lie there all the same.

    Raises:
        LaunchError: Naming the files in the way.
    """
    if not folder.is_dir() or any(any(folder.glob(mark)) for mark in marks):
        return
    allowed = {path.resolve() for path in also}
    found = [path for path in folder.iterdir() if not path.name.startswith(".") and path.resolve() not in allowed]
    if names := sorted(path.name for path in found):
        shown, rest = ", ".join(names[:_NAMED]), len(names) - _NAMED
        more = f" and {rest} more" if rest > 0 else ""
        message = f"{option} {folder} is not empty and not a folder of hopescale's: {shown}{more} could be replaced"
        raise LaunchError(message, "choose another folder, or move the files elsewhere")
