"""A user without an optional package gets one sentence, and the extra of ours that brings it."""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hopescale.cli.app import app
from hopescale.common.errors import HopescaleError
from hopescale.observe.trackers import require_trackers

PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"
COMMANDS = {
    "convert": ("convert", "to-hf", "run", "out"),
    "datasets": ("data", "tokenizer", "hub:a/b", "--out", "tok"),
    "eval": ("eval", "run", "--tasks", "lambada_openai"),
    "parquet": ("data", "tokenizer", "rows", "--out", "tok"),
    "s3": ("data", "tokenizer", "s3://bucket/a", "--out", "tok"),
    "scaling": ("plan", "debug", "--plot", "memory.png"),
    "serve": ("serve", "run"),
    "zstd": ("data", "tokenizer", "packed", "--out", "tok"),
}
"""A command that needs each extra."""
IMPORTED = {"datasets": "datasets", "parquet": "pyarrow", "scaling": "matplotlib", "s3": "s3fs", "zstd": "zstandard"}
"""Packages that are noticed when they are imported; the others are looked for."""
FILES = {"rows": b"PAR1....PAR1", "packed": b"\x28\xb5\x2f\xfd...."}


def said(extra: str) -> str:
    """Use what needs an extra, and return what is said."""
    if extra in ("wandb", "mlflow"):
        with pytest.raises(HopescaleError) as caught:
            require_trackers([extra])
        return f"{caught.value.message} {caught.value.hint}"
    result = CliRunner().invoke(app, COMMANDS[extra])
    assert isinstance(result.exception, HopescaleError), result.output
    return f"{result.exception.message} {result.exception.hint}"


@pytest.mark.parametrize("extra", [*COMMANDS, "wandb", "mlflow"])
def test_a_missing_package_is_told_with_its_extra(extra: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    if extra in IMPORTED:
        monkeypatch.setitem(sys.modules, IMPORTED[extra], None)
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    else:
        monkeypatch.setattr("hopescale.cli.options.find_spec", lambda name: None)
        monkeypatch.setattr("hopescale.observe.trackers.find_spec", lambda name: None)
    assert f"hopescale[{extra}]" in said(extra)


def test_every_extra_is_told():
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    assert set(extras) == {*COMMANDS, "wandb", "mlflow", "triton", "all", "test"}


def test_triton_is_named_where_it_is_asked_for(monkeypatch):
    from hopescale.ops import backends

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(backends, "version", missing)
    backends._installation_problem.cache_clear()
    try:
        assert "hopescale[triton]" in backends._installation_problem()
    finally:
        backends._installation_problem.cache_clear()
