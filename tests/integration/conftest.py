"""The command line in this process, and data and runs so small that a step takes milliseconds."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from hopescale.cli.app import main

WORDS = ("memory", "level", "token", "state", "reads", "writes", "keeps", "a", "the", "of")


@dataclass(frozen=True)
class Outcome:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str


def _hopescale(*args: object) -> Outcome:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    outcome = Outcome(caught.value.code or 0, out.getvalue(), err.getvalue())
    assert "Traceback" not in outcome.err
    return outcome


@pytest.fixture(scope="session")
def hopescale() -> Callable[..., Outcome]:
    """Run `hopescale ARGS` in this process; a traceback fails the test."""
    return _hopescale


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `text/`, a tokenizer `tok/` of 300 pieces and the data set `data/`, made by the verbs."""
    root = tmp_path_factory.mktemp("text")
    (root / "text").mkdir()
    for number in range(60):
        line = " ".join(WORDS[(number * place + place) % len(WORDS)] for place in range(12))
        (root / "text" / f"{number}.txt").write_text(f"note {number}: {line}\n" * 12)
    steps = (
        ("tokenizer", root / "text", "--out", root / "tok", "--vocab-size", 300),
        ("prepare", root / "text", "--out", root / "data", "--tokenizer", root / "tok", "--validation", 0.1),
    )
    for step in steps:
        outcome = _hopescale("data", *step)
        assert outcome.code == 0, outcome.err
    return root
