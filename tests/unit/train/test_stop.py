"""Signals that come before anything listens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DELIVER = """
import os, signal, sys
from hopescale.common import signals
signals.hold()
os.kill(os.getpid(), signal.{name})
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=False)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGHUP"])
def test_a_signal_during_the_imports_is_heard_once_there_are_handlers(name: str):
    done = run(
        DELIVER.format(name=name)
        + """
from hopescale.train.stop import StopRequest
with StopRequest() as stop:
    print(stop.reason)
"""
    )
    assert (done.returncode, done.stdout) == (0, f"{name}\n"), done.stderr


def test_other_verbs_end_at_once():
    done = run(
        DELIVER.format(name="SIGTERM")
        + """
from hopescale.cli.app import main
main(["config", "show", "debug"])
"""
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")


def test_the_module_holds_signals_from_its_first_line():
    text = (ROOT / "hopescale" / "__main__.py").read_text()
    assert text.index("signals.hold()") < text.index("from hopescale.cli.app")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_no_unfinished_folder(tmp_path: Path, name: str):
    done = run(
        f"""
import os, signal
from pathlib import Path
from hopescale.common.disk import staged_folder
with staged_folder(Path({str(tmp_path / "out")!r})) as folder:
    (folder / "half").write_text("")
    os.kill(os.getpid(), signal.{name})
    print("not reached")
"""
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.Signals[name], "", "")
    assert not list(tmp_path.iterdir())


def test_a_signal_that_is_ignored_lets_a_folder_be_finished(tmp_path: Path):
    done = run(
        f"""
import os, signal
from pathlib import Path
from hopescale.common.disk import staged_folder
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with staged_folder(Path({str(tmp_path / "out")!r})) as folder:
    os.kill(os.getpid(), signal.SIGHUP)
"""
    )
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "out").is_dir()
