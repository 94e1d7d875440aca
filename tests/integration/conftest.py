"""The command line in this process, and data and runs so small that a step takes milliseconds."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hopescale.checkpoint.load import load_into
from hopescale.checkpoint.manager import latest_checkpoint
from hopescale.checkpoint.manifest import Manifest, folder_name, read_manifest, step_of
from hopescale.cli.app import main
from hopescale.observe.metrics import read_metrics
from tests.support.tiny import TINY

WORDS = ("memory", "level", "token", "state", "reads", "writes", "keeps", "a", "the", "of")
MEASURED = ("time", "tps", "mfu", "time/step_s", "time/data_s", "device_memory/peak_gib")
"""What two equal runs need not agree on."""

RUN = (
    *TINY,
    "data.seed=3",
    "train.steps=10",
    "train.validation.every=4",
    "train.validation.tokens=64",
    "checkpoint.every=4",
    "checkpoint.keep_last=9",
)


@dataclass(frozen=True)
class Outcome:
    """What a command said and how it ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Run:
    """A run folder, looked at from outside."""

    path: Path

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints."""
        return sorted(step_of(folder) for folder in (self.path / "checkpoints").glob("step-*"))

    def checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / folder_name(step)

    def latest(self) -> Path:
        return latest_checkpoint(self.path / "checkpoints")

    def manifest(self, step: int) -> Manifest:
        return read_manifest(self.checkpoint(step))

    def tensors(self, step: int) -> dict[str, Tensor]:
        """Return everything the checkpoint of a step holds."""
        entries = self.manifest(step).tensors
        tensors = {name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype)) for name, entry in entries.items()}
        load_into(tensors, self.checkpoint(step))
        return tensors

    def values(self) -> list[dict[str, float]]:
        """Return the record without what depends on the clock."""
        records = read_metrics(self.path / "metrics.jsonl")
        return [{name: value for name, value in record.items() if name not in MEASURED} for record in records]

    def content(self, part: str = "") -> dict[str, bytes]:
        """Return every file of the folder or of a part of it."""
        files = (path for path in (self.path / part).rglob("*") if path.is_file())
        return {str(file.relative_to(self.path)): file.read_bytes() for file in files}

    def assert_same(self, other: Run) -> None:
        """Compare every recorded value, and every tensor and number of the last checkpoint, bit for bit."""
        assert self.values() == other.values()
        assert self.latest().name == other.latest().name
        step = step_of(self.latest())
        assert self.manifest(step).progress == other.manifest(step).progress
        found, expected = self.tensors(step), other.tensors(step)
        assert found.keys() == expected.keys()
        assert [name for name in found if _bits(found[name]) != _bits(expected[name])] == []


def _bits(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


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
def tiny() -> tuple[str, ...]:
    """Overrides that make the recipe `debug` smaller: levels of periods 1, 2 and 4, two micro batches a step."""
    return RUN


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The run that `train` trains."""
    return Run(tmp_path / "run")


@pytest.fixture
def train(run: Run) -> Callable[..., Outcome]:
    """Run `hopescale train debug` with the tiny overrides, later ones winning, in the folder of `run`."""
    return lambda *args: _hopescale("train", "debug", *RUN, *args, "--run-dir", run.path)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Give a run of ten steps that nothing interrupted, by precision."""
    done: dict[str, Run] = {}

    def of(precision: str = "fp32") -> Run:
        if precision not in done:
            run = Run(tmp_path_factory.mktemp("whole") / precision)
            outcome = _hopescale("train", "debug", *RUN, f"train.precision={precision}", "--run-dir", run.path)
            assert outcome.code == 0, outcome.err
            done[precision] = run
        return done[precision]

    return of


@pytest.fixture
def five(train: Callable[..., Outcome], run: Run) -> Run:
    """`run`, stopped at step 5: in mid-period of both slow levels."""
    assert train("--stop-at", 5).code == 0
    return run


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
