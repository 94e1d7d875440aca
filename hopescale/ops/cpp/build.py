"""The shared library of this folder's C++: compiled for this machine on first use, kept in the user's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread", "-fno-math-errno", "-fno-trapping-math")


class BuildError(Exception):
    """Why there is no library, in one clause."""


def compiler() -> list[str] | None:
    """Return the command of the C++ compiler: that of the environment variable CXX, else the first usual name."""
    named = shlex.split(os.environ.get("CXX", ""))
    commands = [named] if named else [["c++"], ["g++"], ["clang++"]]
    return next(([found, *options] for name, *options in commands if (found := shutil.which(name))), None)


@cache
def problem() -> str | None:
    """Return why there is no library, None if there is one. Compiles it if it has to; warns once if it cannot."""
    try:
        library()
    except BuildError as error:
        warnings.warn(f"{error}: torch's operations run in its place, memories several times slower", stacklevel=2)
        return str(error)
    return None


@cache
def library() -> ctypes.CDLL:
    """Load the library, after compiling it if no earlier process has for this source, compiler and processor.

    Raises:
        BuildError: If there is no compiler, it fails, or the library can be neither kept nor loaded.
    """
    try:
        name, folder = f"ops-{_digest()}", _cache()
        for kept in folder.glob(f"{name}-*.so"):
            if _is_whole(kept):
                return ctypes.CDLL(str(kept))
            kept.unlink(missing_ok=True)
        path = _compile(folder, name)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"the C++ library could not be built or loaded: {error}") from error


def _cache() -> Path:
    """Return a folder that this process may write to, and no other user, because code from it is run."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hopescale"
        root.mkdir(parents=True, exist_ok=True)
        if os.access(root, os.W_OK | os.X_OK):
            return root
    except (OSError, RuntimeError):  # the latter where nothing says which folder is home
        pass
    root = Path(tempfile.gettempdir()) / f"hopescale-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.lstat().st_uid != os.getuid():
        raise BuildError(f"{root} belongs to another user, and there is no cache folder to write to")
    return root


def _digest() -> str:
    """Name the source, flags, compiler and processor of a library: machines that share a cache may differ in these."""
    digest = hashlib.sha256(" ".join((*FLAGS, str(compiler()), platform.machine(), _processor())).encode())
    for source in sorted(SOURCES.glob("*.[hc]*")):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _is_whole(path: Path) -> bool:
    """Compare a kept library with the digest in its name: the loader takes one that was cut, and dies of it."""
    return path.stem.rpartition("-")[2] == _digest_of(path)


def _digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _compile(folder: Path, name: str) -> Path:
    """Compile the library into the cache, under a name that ends in the digest of its contents."""
    found = compiler()
    if found is None:
        raise BuildError("there is no C++ compiler: neither c++, g++ nor clang++, nor what CXX names")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        compiled = Path(scratch) / f"{name}.so"
        command = [*found, *FLAGS, *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", str(compiled)]
        english = os.environ | {"LC_ALL": "C"}
        result = subprocess.run(command, env=english, capture_output=True, text=True, errors="replace", check=False)
        if result.returncode:
            first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip())
            raise BuildError(f"{shlex.join(found)} could not compile {SOURCES.name}: {first}")
        return compiled.replace(folder / f"{name}-{_digest_of(compiled)}.so")
