"""What a process runs: Python, packages, and the revision of this one's source."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

from hopescale.common.paths import package_folder

REVISION = "revision.txt"
"""File beside a copy of the package that names the revision it was taken from."""

_PACKAGES = ("hopescale", "torch", "megatron-core", "deepspeed", "numpy", "sentencepiece", "webdataset", "omegaconf")


def describe_software() -> str:
    """Write versions, command and revision, one a line."""
    lines = [f"python {platform.python_version()} on {platform.platform()}", f"command {' '.join(sys.argv)}"]
    lines += [f"{package} {_version(package)}" for package in _PACKAGES]
    return "\n".join([*lines, f"git {source_revision()}"]) + "\n"


def source_revision() -> str:
    """Return the revision of the source, marked if it differs; `none` where git does not track this package."""
    recorded = package_folder().parent / REVISION
    if recorded.is_file():
        return recorded.read_text(encoding="utf-8").strip()
    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return "none"
    return f"{git('rev-parse', 'HEAD')}{' with local changes' if git('status', '--porcelain') else ''}"


def git(*words: str) -> str | None:
    """Return what git says in the folder of this package; None if it fails."""
    command = ["git", "-C", str(package_folder()), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"
