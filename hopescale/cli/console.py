"""Standard output and error, which may be lost while a command works: a closed pipe, a full disk, a terminal left."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import typer

_LEFT = (errno.EPIPE, errno.EIO, errno.EBADF)
"""Errors of a stream that nobody reads any more; others mean that somebody wanted what could not be written."""


class _Stream(io.FileIO):
    """A stand-in for a file descriptor that can no longer be written to; it notes why."""

    def __init__(self, descriptor: int):
        super().__init__(descriptor, "w", closefd=False)
        self.lost: OSError | None = None

    def write(self, data: bytes) -> int | None:
        if self.lost is None:
            try:
                return super().write(data)
            except OSError as error:
                self.lost = error
        return len(data)


class Console:
    """Both streams of this process, so guarded that a loss raises nothing; a context manager.

    Streams that are no files, as in tests, stay as they are.
    """

    def __init__(self) -> None:
        self._streams: dict[str, _Stream] = {}
        self._previous: dict[str, TextIO] = {}
        self._file: Path | None = None

    def __enter__(self) -> Console:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            with suppress(OSError, AttributeError, ValueError):  # none, or not a file
                raw = _Stream(stream.fileno())
                kinds = {kind: getattr(stream, kind) for kind in ("encoding", "errors", "line_buffering")}
                stream.flush()
                setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), **kinds))
                self._streams[name], self._previous[name] = raw, stream
        return self

    def __exit__(self, *_: object) -> None:
        for name, stream in self._previous.items():
            getattr(sys, name).flush()
            setattr(sys, name, stream)

    @property
    def lost(self) -> OSError | None:
        """Error with which standard output, or else standard error, was lost; None as long as both are there."""
        return next((stream.lost for stream in self._streams.values() if stream.lost), None)

    @property
    def is_unread(self) -> bool:
        """Whether nobody reads standard output any more."""
        return "stdout" in self._streams and getattr(self._streams["stdout"].lost, "errno", None) in _LEFT

    @property
    def failure(self) -> OSError | None:
        """Error that kept standard output from somebody who wanted it; None if there is none."""
        return None if self.is_unread or "stdout" not in self._streams else self._streams["stdout"].lost

    def keep(self, file: Path) -> None:
        """Add lines to this file that cannot be shown."""
        self._file = file

    def say(self, line: str, *, err: bool = False) -> None:
        """Print a line, or keep it."""
        typer.echo(line, err=err)
        stream = self._streams.get("stderr" if err else "stdout")
        if self._file is not None and stream is not None and stream.lost is not None:
            self._keep(line, stream.lost)

    def _keep(self, line: str, lost: OSError) -> None:
        # A disk that is full is told where the record is written.
        with suppress(OSError), self._file.open("a", encoding="utf-8") as file:
            if not file.tell():
                file.write(f"the console was lost: {lost.strerror}; what could not be shown follows\n")
            file.write(f"{line}\n")


def open_missing_streams() -> None:
    """Open the null device for streams that a shell has closed, before a file of ours gets their numbers."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
