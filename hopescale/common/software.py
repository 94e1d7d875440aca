"""The software of a process: Python, packages, and the revision of hopescale's source."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

from hopescale.common.paths import PACKAGE

REVISION = "revision.txt"
"""File beside a copy of the package that names the revision it was taken from."""

_CODE = (".py", ".cpp", ".h")
"""Suffixes of the files of a package that hold code."""
_PACKAGES = ("hopescale", "torch", "megatron-core", "deepspeed", "numpy", "sentencepiece", "webdataset", "omegaconf")


def describe_software() -> str:
    """Write versions, command and revision, one a line."""
    lines = [f"python {platform.python_version()} on {platform.platform()}", f"command {' '.join(sys.argv)}"]
    lines += [f"{package} {_version(package)}" for package in _PACKAGES]
    return "\n".join([*lines, f"git {source_revision()}"]) + "\n"


def software() -> dict[str, str]:
    """Return by name the software that decides the numbers of a run: the code of this package, and versions.

    The content decides whether code is the same: clones at different commits may hold the same, and edited ones not.
    """
    digest, package = hashlib.sha256(), PACKAGE
    for path in sorted(path for path in package.rglob("*") if path.suffix in _CODE):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    # A look for local changes takes long, and they may change meanwhile.
    code = f"{_recorded() or git('rev-parse', 'HEAD') or 'none'}, content {digest.hexdigest()[:12]}"
    versions = {f"the version of {name}": _version(name) for name in _PACKAGES}
    return {"the code revision": code, "the version of python": platform.python_version(), **versions}


def _recorded() -> str | None:
    """Return the revision that was noted when this copy of the package was made."""
    file = PACKAGE.parent / REVISION
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def source_revision() -> str:
    """Return the revision of the source, marked if it differs; `none` where git does not track this package."""
    if recorded := _recorded():
        return recorded
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return "none"
    return f"{git('rev-parse', 'HEAD')}{' with local changes' if git('status', '--porcelain') else ''}"


def git(*words: str) -> str | None:
    """Return the output of git in the folder of this package; None if git fails."""
    command = ["git", "-C", str(PACKAGE), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"
