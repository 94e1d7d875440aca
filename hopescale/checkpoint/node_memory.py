"""The files of a run in the memory of one node: parts of ranks, each a block of bytes and a note when it is whole."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hopescale.checkpoint.manifest import FORMAT, Manifest, folder_name, step_of
from hopescale.checkpoint.save import dtype_name
from hopescale.common.disk import replace_text
from hopescale.common.errors import CheckpointError

_ALIGNED = 64


@dataclass(frozen=True)
class PartNote:
    """Note on a rank's part of a step that all ranks have written to the end.

    Attributes:
        step: Optimizer steps done.
        rank: Rank whose part it is.
        size: Bytes of the part.
        digest: SHA-256 of the part.
        agreed: Sums of the digests of all ranks, the same in every note of one save.
    """

    step: int
    rank: int
    size: int
    digest: str
    agreed: tuple[int, ...]


class NodeMemory:
    """Parts of a run's state in a folder that lies in memory, such as `/dev/shm`, and outlives the processes.

    Others can write in `/dev/shm` too: the run's folder is used only while it is this user's alone.

    Args:
        folder: Folder in memory.
        run: Name that no other run has.
        course: Name of the run's course; parts of its other courses count for nothing.
    """

    def __init__(self, folder: Path, run: str, course: str):
        self.run, self.course = run, course
        self.folder = folder / f"hopescale-{os.getuid()}-{run}"

    def reserve(self, step: int, rank: int, holder: int, size: int) -> Tensor:
        """Return `size` bytes of memory for a part, uint8, which are a file.

        Args:
            step: Optimizer steps done.
            rank: Rank whose part it will be.
            holder: Rank that writes it here.
            size: Bytes.

        Raises:
            OSError: If there is no room; writing beyond it would end the process.
            CheckpointError: If the run's folder is open to other users.
        """
        path = self._path(step, rank, holder)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self._require_private()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with path.open("w+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, size)
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)

    def commit(self, note: PartNote, holder: int) -> None:
        """Note that a part is whole, as are those of all other ranks."""
        path = self._path(note.step, note.rank, holder)
        replace_text(path.with_name(f"{path.name}.json"), json.dumps(asdict(note)))

    def notes(self) -> dict[PartNote, Path]:
        """Return the parts of this course on this node that are whole, and where they are.

        Raises:
            CheckpointError: If the run's folder is open to other users.
        """
        if not os.path.lexists(self.folder):
            return {}
        self._require_private()
        found = {}
        for path in sorted(self.folder.glob(f"{self.course}/step-*/rank-*.json")):
            try:
                fields, block = json.loads(path.read_text()), path.with_suffix("")
                note = PartNote(**fields | {"agreed": tuple(fields["agreed"])})
                if block.stat().st_size == note.size:
                    found[note] = block
            except (OSError, ValueError, TypeError, KeyError):
                continue  # removed meanwhile, in part or whole, or not ours
        return found

    def read(self, path: Path) -> Tensor:
        """Return a part's bytes, `[size]` uint8, without reading them.

        Raises:
            OSError: If the part is gone.
        """
        return torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)

    def remove(self, *, but: int | None = None) -> None:
        """Remove the parts of all steps of this course except one, of any rank, and all parts of other courses.

        Notes go first, so that none outlives its part; other ranks may remove at the same time.
        """
        if not self._is_private():
            return
        for folder in self.folder.glob("*/step-*"):
            if but is None or folder.parent.name != self.course or step_of(folder) != but:
                for note in folder.glob("*.json"):
                    note.unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)
        if but is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def free(self) -> int:
        """Return the bytes that are free."""
        return shutil.disk_usage(next(each for each in (self.folder, *self.folder.parents) if each.exists())).free

    def _is_private(self) -> bool:
        """Tell whether the run's folder is there, and nobody else's to read or to write."""
        try:
            found = self.folder.lstat()
        except OSError:
            return False
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077

    def _require_private(self) -> None:
        if not self._is_private():
            hint = "find out who made it and remove it, or name another checkpoint.memory.folder"
            raise CheckpointError(f"{self.folder} is not a folder that is this user's alone", hint)

    def _path(self, step: int, rank: int, holder: int) -> Path:
        return self.folder / self.course / folder_name(step) / f"rank-{rank}.at-{holder}"


class Part:
    """A rank's state as one block of bytes: tensors by name, and the manifest.

    Args:
        tensors: Tensors on any device.
        manifest: Numbers beside them.

    Attributes:
        size: Bytes of the block.
    """

    def __init__(self, tensors: Mapping[str, Tensor], manifest: Manifest):
        self._tensors, position, entries = dict(tensors), 0, []
        for name, tensor in self._tensors.items():
            entries.append([name, dtype_name(tensor.dtype), list(tensor.shape), position])
            position += math.ceil(tensor.nbytes / _ALIGNED) * _ALIGNED
        facts = {"progress": manifest.progress, "config": manifest.config, "identity": manifest.identity}
        head = json.dumps({"format": FORMAT, "manifest": facts, "tensors": entries}).encode()
        self._head = len(head).to_bytes(8, "little") + head
        self._start = math.ceil(len(self._head) / _ALIGNED) * _ALIGNED
        self._entries, self.size = entries, self._start + position

    def write(self, block: Tensor) -> None:
        """Copy all of it into a block of `size` bytes."""
        block[: len(self._head)].copy_(torch.frombuffer(bytearray(self._head), dtype=torch.uint8))
        for (*_, position), tensor in zip(self._entries, self._tensors.values(), strict=True):
            room = block[self._start + position :][: tensor.nbytes]
            room.view(tensor.dtype).copy_(tensor.detach().reshape(-1))


def read_part(block: Tensor) -> tuple[dict[str, Tensor], Manifest]:
    """Return the tensors of a block, as views of it, and the manifest.

    Raises:
        CheckpointError: If the format is another.
    """
    length = int.from_bytes(bytes(block[:8].tolist()), "little")
    head = json.loads(bytes(block[8 : 8 + length].numpy()))
    if head["format"] != FORMAT:
        raise CheckpointError(f"a checkpoint in memory has format {head['format']}, this hopescale reads {FORMAT}")
    return dict(_views(head["tensors"], block, math.ceil((8 + length) / _ALIGNED) * _ALIGNED)), Manifest(
        **head["manifest"]
    )


def _views(entries: list[list[Any]], block: Tensor, start: int) -> Iterator[tuple[str, Tensor]]:
    for name, dtype, shape, position in entries:
        kind = getattr(torch, dtype)
        room = block[start + position :][: math.prod(shape) * kind.itemsize]
        yield name, room.view(kind).view(shape)


def digest_of(block: Tensor) -> bytes:
    """Return the SHA-256 of bytes `[size]` uint8 on the CPU."""
    return hashlib.sha256(memoryview(block.numpy())).digest()
