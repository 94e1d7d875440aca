"""A copy of the package in a run folder: what is edited while a job waits does not change the job."""

from __future__ import annotations

import shutil
from pathlib import Path

from hopescale.common.paths import PACKAGE, shipped_folder
from hopescale.common.software import REVISION, git, source_revision

DIFF = "changes.diff"


def take_snapshot(code: Path) -> None:
    """Copy this package and its recipes to `code/`, with the revision it is of and, if it differs, the difference.

    A copy that is there already is replaced, unless it is the one that runs.

    Args:
        code: Folder to make; goes on `PYTHONPATH`.

    Raises:
        OSError: If it cannot be written.
    """
    source, partial = PACKAGE, code.with_name(f".{code.name}.partial")
    if source.parent == code.resolve():
        return
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    if (recipes := shipped_folder("recipes")).parent != source:
        shutil.copytree(recipes, partial / recipes.name)
    (partial / REVISION).write_text(f"{source_revision()}\n", encoding="utf-8")
    if difference := git("diff", "HEAD"):
        (partial / DIFF).write_text(f"{difference}\n", encoding="utf-8")
    shutil.rmtree(code, ignore_errors=True)
    partial.rename(code)
