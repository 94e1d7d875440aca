"""Streams that are lost while a command works."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from hopescale.cli.progress import progress_bar

ROOT = Path(__file__).parents[3]
FULL = Path("/dev/full")
SAY = """
import sys
from pathlib import Path
from hopescale.cli.console import Console
with Console() as console:
    console.keep(Path(sys.argv[1]))
    for number in range(3):
        console.say(f"line {number}")
        console.say(f"error {number}", err=True)
    (Path(sys.argv[1]).parent / "seen").write_text(f"{console.is_unread} {console.failure is not None}")
"""


def start(code: str, *args: object, stdout: object, stderr: object = subprocess.PIPE) -> subprocess.Popen[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdout=stdout, stderr=stderr, text=True, env=environ)


def closed_pipe() -> int:
    """Return a descriptor that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    return write


def test_lines_for_a_closed_pipe_are_kept(tmp_path: Path):
    child = start(SAY, tmp_path / "lost", stdout=closed_pipe())
    assert child.communicate(timeout=60)[1] == "error 0\nerror 1\nerror 2\n" and child.returncode == 0
    reason, *lines = (tmp_path / "lost").read_text().splitlines()
    assert reason == "the console was lost: Broken pipe; what could not be shown follows"
    assert lines == ["line 0", "line 1", "line 2"]
    assert (tmp_path / "seen").read_text() == "True False"


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_lines_for_a_full_device_are_kept(tmp_path: Path):
    with FULL.open("w") as full:
        assert start(SAY, tmp_path / "lost", stdout=full, stderr=full).wait(60) == 0
    reason, *lines = (tmp_path / "lost").read_text().splitlines()
    assert "No space left on device" in reason
    assert lines == ["line 0", "error 0", "line 1", "error 1", "line 2", "error 2"]
    assert (tmp_path / "seen").read_text() == "False True"


def test_nothing_is_kept_as_long_as_lines_are_shown(tmp_path: Path):
    assert (
        start(SAY, tmp_path / "lost", stdout=subprocess.PIPE).communicate(timeout=60)[0] == "line 0\nline 1\nline 2\n"
    )
    assert not (tmp_path / "lost").exists()


SHOW = "from hopescale.cli.app import main; main(['config', 'show', 'debug'])"


@pytest.mark.skipif(not FULL.exists(), reason="needs a device that is always full")
def test_a_result_that_cannot_be_written_is_an_error():
    with FULL.open("w") as full:
        child = start(SHOW, stdout=full)
        assert child.communicate(timeout=60)[1] == "error\n  cannot write standard output: No space left on device\n"
    assert child.returncode == 1


def test_a_result_of_which_enough_was_read_is_none():
    child = start(SHOW, stdout=closed_pipe())
    assert child.communicate(timeout=60)[1] == "" and child.returncode == 0


def test_a_closed_stream_is_not_the_next_file_that_is_opened():
    code = """
import os
os.close(1)
from hopescale.cli.console import open_missing_streams
open_missing_streams()
print(os.path.samestat(os.fstat(1), os.stat(os.devnull)))
os.write(2, str(os.path.samestat(os.fstat(1), os.stat(os.devnull))).encode())
"""
    assert start(code, stdout=subprocess.PIPE).communicate(timeout=60)[1] == "True"


def test_a_bar_of_counts_shows_rate_and_begins_again_with_what_is_asked_next(monkeypatch):
    monkeypatch.setattr("sys.stderr", out := io.StringIO())
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress_bar("asking", unit="texts") as bar:
        bar.show(3, 8)
        bar.show(8, 8)
        bar.show(1, 40)
    assert "1/40" in out.getvalue() and "left" in out.getvalue()


def test_lines_for_a_pipe_are_not_drawn_above_a_bar(monkeypatch):
    monkeypatch.setattr("sys.stderr", shown := io.StringIO())
    monkeypatch.setattr("sys.stdout", piped := io.StringIO())
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("asking", 8):
        typer.echo("a result")
    assert piped.getvalue() == "a result\n"
    assert "asking" in shown.getvalue() and "a result" not in shown.getvalue()
