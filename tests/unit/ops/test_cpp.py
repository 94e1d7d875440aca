"""Building the C++ library: once for a source and a machine, with a clear word where it cannot be."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from hopescale.ops.cpp import build
from hopescale.ops.self_modifying import ChunkRule, Streams, Weights, backend


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache, seen by functions that have forgotten what they found."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for function in (build.library, build.obstacle):
        function.cache_clear()
    yield tmp_path / "hopescale"
    for function in (build.library, build.obstacle):
        function.cache_clear()


@pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
def test_the_library_is_built_once(fresh: Path):
    build.library()
    (made,) = fresh.iterdir()
    before = made.stat().st_mtime_ns
    build.library.cache_clear()
    build.library()
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [before]


def test_a_missing_compiler_is_named_once_and_the_loop_runs(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    backend._warn.cache_clear()
    rule = ChunkRule(("mem",), (), 16, 8, "l2", True, True, None, 0.01, 1.0, "prefix")
    streams = Streams(*(torch.zeros(1, 1, 9, 16) for _ in "kvq"), torch.zeros(1, 1, 9), None, None)
    running = Weights(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 1, 16, 16), None)
    with pytest.warns(UserWarning, match="no C.. compiler.*CXX names: memories are trained by torch.*slower"):
        assert backend.fused_chunks(streams, running, rule, "auto") is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.fused_chunks(streams, running, rule, "auto") is None
    with pytest.raises(ValueError, match="backend is 'cpp', but there is no C.. compiler"):
        backend.fused_chunks(streams, running, rule, "cpp")
    assert not list(fresh.iterdir())


@pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
def test_an_error_of_the_compiler_is_shown(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "FLAGS", ("-no-such-option",))
    with pytest.raises(build.BuildError, match="could not compile.*no-such-option"):
        build.library()


def test_other_types_and_devices_are_left_alone():
    assert "not float64 on cpu" in build.obstacle(torch.device("cpu"), torch.float64)
    assert "not float32 on meta" in build.obstacle(torch.device("meta"), torch.float32)
