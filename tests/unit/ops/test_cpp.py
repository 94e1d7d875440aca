"""Building the C++ library: once for a source and a machine, with a clear word where it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hopescale.ops.cpp import build


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


def test_without_a_compiler_one_warning_says_so(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="there is no C\\+\\+ compiler.*several times slower"):
        why = build.obstacle(torch.device("cpu"), torch.float32)
    assert "no C++ compiler" in why
    assert not list(fresh.iterdir())


@pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
def test_an_error_of_the_compiler_is_shown(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "FLAGS", ("-no-such-option",))
    with pytest.raises(build.BuildError, match="could not compile.*no-such-option"):
        build.library()


def test_other_types_and_devices_are_left_alone():
    assert "not float64 on cpu" in build.obstacle(torch.device("cpu"), torch.float64)
    assert "not float32 on meta" in build.obstacle(torch.device("meta"), torch.float32)
