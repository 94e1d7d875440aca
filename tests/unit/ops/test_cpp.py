"""Building the C++ library: once for a source and a machine, with a clear word where it cannot be."""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hopescale.ops.cpp import build
from hopescale.ops.limits import BLOCK
from hopescale.ops.self_modifying import Memories, MemorySpec, MemoryState, Streams, Weights, cpp, self_modifying


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache, seen by functions that have forgotten what they found."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for function in (build.library, build.problem):
        function.cache_clear()
    yield tmp_path / "hopescale"
    for function in (build.library, build.problem):
        function.cache_clear()


def make_streams() -> Streams:
    return Streams(*(torch.zeros(1, 1, 9, 16) for _ in "kvq"), torch.zeros(1, 1, 9), None, None)


def make_state(w_out: torch.Tensor | None) -> Memories:
    weights = Weights(torch.zeros(1, 1, 16, 16), w_out, None)
    return Memories(MemoryState(weights, None, weights), None)


@pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
def test_the_library_is_built_once(fresh: Path):
    build.library()
    (made,) = fresh.iterdir()
    before = made.stat().st_mtime_ns
    build.library.cache_clear()
    build.library()
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [before]


@pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
def test_a_kept_library_that_was_cut_is_built_anew(fresh: Path):
    kept = build._compile(build._cache(), f"ops-{build._digest()}")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:5000])
    assert build.library().hopescale_forward
    (again,) = fresh.iterdir()
    assert again.stat().st_size == len(whole)


def test_a_missing_compiler_is_named_once_and_the_loop_runs(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(cpp, "library", lambda: pytest.fail("the C++ is called"))
    spec = MemorySpec(("mem",), (), 16, 8, "l2", True, True, None, 0.01, 1.0, "prefix")
    given = make_streams(), make_state(torch.zeros(1, 1, 1, 16, 16)), spec
    with pytest.warns(UserWarning, match="no C.. compiler.*CXX names: torch.s operations run in its place, .*slower"):
        self_modifying(*given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        self_modifying(*given)
    with pytest.raises(ValueError, match="backend is 'cpp', but there is no C.. compiler"):
        self_modifying(*given, backend="cpp")
    assert not list(fresh.iterdir())


@pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
def test_an_error_of_the_compiler_is_shown(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "FLAGS", ("-no-such-option",))
    with pytest.raises(build.BuildError, match="could not compile.*no-such-option"):
        build.library()


@pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
def test_the_compiler_may_be_named_with_options(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", f"{build.compiler()[0]} -no-such-option")
    with pytest.raises(build.BuildError, match="could not compile.*no-such-option"):
        build.library()


def test_a_library_that_cannot_be_loaded_is_an_obstacle(fresh: Path, monkeypatch: pytest.MonkeyPatch):
    def spoilt(folder: Path, name: str) -> Path:
        (folder / name).write_text("not a library")
        return folder / name

    monkeypatch.setattr(build, "_compile", spoilt)
    with pytest.warns(UserWarning, match="could not be built or loaded"):
        assert "could not be built or loaded" in build.problem()


def without_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)


@pytest.mark.parametrize("spoil", [without_home, read_only])
def test_without_a_cache_folder_the_users_own_temporary_one_serves(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spoil: Callable[[pytest.MonkeyPatch], None]
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spoil(monkeypatch)
    assert build._cache() == tmp_path / f"hopescale-{os.getuid()}"
    somebody = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: somebody)
    with pytest.raises(build.BuildError, match="belongs to another user"):
        build._cache()


def test_python_and_the_code_agree_on_the_width_of_a_block():
    header = (build.SOURCES / "matrix.h").read_text()
    assert re.findall(r"constexpr int BLOCK = (\d+);", header) == [str(BLOCK)]


@pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
def test_chunks_too_large_for_the_machine_are_an_error(monkeypatch: pytest.MonkeyPatch):
    given = cpp.CMemorySpec.of

    def endless(*args: object) -> cpp.CMemorySpec:
        c = given(*args)
        c.chunk = 1 << 24
        return c

    monkeypatch.setattr(cpp.CMemorySpec, "of", endless)
    spec = MemorySpec(("mem",), (), None, 8, "l2", False, True, None, 0.01, 1.0, "prefix")
    with pytest.raises(MemoryError, match=f"chunks of {1 << 24} tokens"):
        cpp.self_modifying_cpp(make_streams(), make_state(None), spec)
