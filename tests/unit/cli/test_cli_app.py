from __future__ import annotations

import subprocess
import sys

import pytest

from hopescale import __version__
from hopescale.cli.app import app, main
from hopescale.common.errors import CheckpointError, ConfigError, DataError, DivergedError, LaunchError, StoppedEarly


def run(capsys, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(args)
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"hopescale {__version__}\n", "")


def test_problems_are_one_message_and_exit_2(capsys):
    code, out, err = run(capsys, "config", "check", "hope_tiny", "train.stpes=3", "lr=1")
    assert (code, out) == (2, "")
    assert err.startswith("config error (2 problems)\n  train.stpes: unknown key   [command line]\n    hint: did you")
    assert "Traceback" not in err


def test_verbose_shows_the_traceback(capsys):
    code, _, err = run(capsys, "-v", "config", "check", "hope_tiny", "lr=1")
    assert code == 2 and "Traceback" in err and "config error (1 problem)" in err


@pytest.mark.parametrize("args", ["nope", "config nope", "config check", "config check hope_tiny --nope"])
def test_usage_errors_exit_2(capsys, args):
    code, _, err = run(capsys, *args.split())
    assert code == 2 and "Usage: hopescale" in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError, 2),
        (DataError, 3),
        (CheckpointError, 4),
        (LaunchError, 5),
        (DivergedError, 6),
        (StoppedEarly, 75),
        (KeyboardInterrupt, 130),
    ],
)
def test_exit_codes(capsys, monkeypatch, error, code):
    def fail(*args):
        raise error("gone wrong")

    monkeypatch.setattr("hopescale.cli.config.load_recipe", fail)
    assert run(capsys, "config", "show", "x")[0] == code


def test_every_verb_is_mounted():
    named = {command.callback.__name__ for command in app.registered_commands}
    named |= {group.name for group in app.registered_groups}
    assert {"train", "generate", "config", "data"} <= named


@pytest.mark.parametrize(
    "args", ["--help", "config show hope_tiny", "train --help", "data --help", "sweep plan hope_vs_transformer"]
)
def test_light_verbs_import_no_torch(args):
    code = f"""
import sys
from hopescale.cli.app import main
try:
    main({args.split()!r})
finally:
    assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
