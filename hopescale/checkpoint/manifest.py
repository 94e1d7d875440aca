"""What a checkpoint folder is called, what it holds, and what `manifest.json` says. Files and JSON, no torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hopescale.common.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
EXPORT = "hopescale.json"
"""The manifest of an export: where it comes from, and size and SHA-256 of each file."""
POINTER = "latest"
Listener = Callable[[int], None]
"""Who hears of bytes that were read or written since its last call."""
_NAME = re.compile(r"step-(\d{8,})")
_PART = 2**20
"""Bytes of a file that are read at a time."""


@dataclass(frozen=True)
class TensorEntry:
    """Global shape and dtype (`float32`, `bfloat16`, ...) of a saved tensor."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of a file of the checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything a checkpoint holds besides tensors.

    Whoever saves fills the first three; the rest is filled while the files are written. Values are what JSON can carry
    (finite numbers, text, lists, dicts with text keys); floats return bit-equal, tuples return as lists.
    """

    progress: dict[str, Any]
    """Where the run stands: `step`, `tokens_seen`, and whatever else the trainer continues from."""
    config: dict[str, Any]
    """The resolved config."""
    identity: dict[str, str]
    """Fingerprints by name (`model`, `data`) of what may not change within a run."""
    format: int = FORMAT
    versions: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.progress["step"]


def fingerprint(value: Any) -> str:
    """Return the SHA-256 of a JSON-able value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def folder_name(step: int) -> str:
    """Return the name of the checkpoint of a step: `step-00001200`."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int | None:
    """Return the step that a folder's name states, or None when it is not named like a checkpoint."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def checkpoint_folders(root: Path) -> list[Path]:
    """List the folders under `root` with the name of a checkpoint, oldest step first, complete or not."""
    found = [(step, path) for path in root.glob("step-*") if (step := step_of(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(found)]


def read_pointer(root: Path) -> Path | None:
    """Return the folder that `latest` names, whether or not it exists, or None without a readable pointer."""
    try:
        name = (root / POINTER).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return root / name if _NAME.fullmatch(name) else None


def describe_file(path: Path, on_read: Listener = lambda num_bytes: None) -> FileEntry:
    """Read a file once and return its size and SHA-256; a listener hears of the bytes of each part."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(_PART):
            digest.update(part)
            on_read(len(part))
        return FileEntry(os.fstat(stream.fileno()).st_size, digest.hexdigest())


def to_json(manifest: Manifest) -> str:
    """Write a manifest as JSON text that carries its own checksum."""
    body = json.loads(json.dumps(asdict(manifest), allow_nan=False))
    return json.dumps({**body, "checksum": fingerprint(body)}, indent=1) + "\n"


def read_manifest(folder: Path, file: str = MANIFEST) -> Manifest:
    """Read and check `manifest.json` of a checkpoint folder, or a manifest that another kind of folder holds as `file`.

    Raises:
        CheckpointError: If the folder or the manifest is missing, unreadable, damaged or of an unknown format.
    """
    path = folder / file
    try:
        body = json.loads(path.read_bytes())
    except FileNotFoundError:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} does not exist", "see what `checkpoints/` of the run holds") from None
        raise CheckpointError(f"{folder} is not a checkpoint: it holds no {file}", _earlier(folder)) from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError:
        raise CheckpointError(f"{path} is damaged: not valid JSON", _earlier(folder)) from None
    return _from_json(body, path)


def _from_json(body: Any, path: Path) -> Manifest:
    changed = CheckpointError(f"{path} is damaged: its content does not match its checksum", _earlier(path.parent))
    if not isinstance(body, dict):
        raise changed
    checksum = body.pop("checksum", None)
    if body.get("format", FORMAT) != FORMAT:
        message = f"{path} has format {body['format']}, this version of hopescale reads format {FORMAT}"
        raise CheckpointError(message, "use the version of hopescale that wrote it; `versions` in the file names it")
    if checksum != fingerprint(body):
        raise changed
    tensors = {name: TensorEntry(tuple(entry["shape"]), entry["dtype"]) for name, entry in body.pop("tensors").items()}
    files = {name: FileEntry(**entry) for name, entry in body.pop("files").items()}
    return Manifest(**body, tensors=tensors, files=files)


def file_problems(
    folder: Path, files: Mapping[str, FileEntry], *, digests: bool, on_read: Listener = lambda num_bytes: None
) -> list[str]:
    """Compare files with their entries in the manifest: sizes, and with `digests` also every byte.

    Returns:
        One line per missing, truncated or changed file; empty when all is well.
    """
    found = (_file_problem(folder / name, entry, digests, on_read) for name, entry in files.items())
    return [problem for problem in found if problem]


def _file_problem(path: Path, entry: FileEntry, digests: bool, on_read: Listener) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return f"{path.name} has {size} bytes, the manifest says {entry.bytes}"
        if digests and describe_file(path, on_read).sha256 != entry.sha256:
            return f"{path.name} has other content than the manifest's SHA-256 says"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return None


def incomplete_because(folder: Path) -> str | None:
    """Say why a folder is not a complete checkpoint, judging by its manifest and file sizes; None when it is."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return error.message
    problems = file_problems(folder, manifest.files, digests=False)
    return f"{folder} is damaged: {'; '.join(problems)}" if problems else None


def _earlier(folder: Path) -> str | None:
    step = step_of(folder) or 0
    older = [path for path in checkpoint_folders(folder.parent) if step_of(path) < step and (path / MANIFEST).exists()]
    return f"resume from an earlier checkpoint: --resume {older[-1]}" if older else None


def damaged(folder: Path, problems: list[str]) -> CheckpointError:
    """Make the error for a checkpoint whose files differ from its manifest."""
    return CheckpointError(f"{folder} is damaged: {'; '.join(problems)}", _earlier(folder))
