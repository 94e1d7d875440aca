"""Writes that survive a loss of power."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def replace_text(path: Path, text: str) -> None:
    """Write a file so that its readers see the old text or the new, whole."""
    written = path.parent / f".tmp-{path.name}"
    written.write_text(text, encoding="utf-8")
    written.replace(path)
