"""Writing a checkpoint: DCP files and manifest into a temporary folder, one rename, then the pointer."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

import hopescale
from hopescale.checkpoint.manifest import (
    MANIFEST,
    POINTER,
    TOKENIZER,
    FileEntry,
    Manifest,
    TensorEntry,
    describe_file,
    folder_name,
    read_pointer,
    to_json,
)
from hopescale.common.disk import sync, write_synced
from hopescale.common.errors import CheckpointError
from hopescale.common.units import format_bytes

TEMPORARY = ".tmp-"
REPLACED = ".replaced-"


def flatten(state: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Turn nested dicts of tensors into one dict with dotted names.

    Raises:
        TypeError: If a leaf is not a tensor; such values belong into the manifest.
    """
    flat: dict[str, Tensor] = {}
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        elif isinstance(value, Tensor):
            flat[name] = value
        else:
            raise TypeError(f"{name} is a {type(value).__name__}, a checkpoint's state holds only tensors")
    return flat


def dtype_name(dtype: torch.dtype) -> str:
    """Return `bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def ignore_single_process_warning() -> None:
    """Silence DCP's remark that without a process group it works in a single process; nothing else."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class _DigestingStream:
    """A file open for writing that digests what passes through."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.sha256.update(data)
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _DigestingFileSystem(FileSystem):
    """DCP's file system, remembering size and SHA-256 of each file it wrote."""

    def __init__(self) -> None:
        self.written: dict[str, FileEntry] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[_DigestingStream]:
        with super().create_stream(path, mode) as raw:
            stream = _DigestingStream(raw)
            yield stream
        size = os.stat(path).st_size
        self.written[Path(path).name] = FileEntry(size, stream.sha256.hexdigest())


@dataclass(frozen=True)
class _DigestedResult(WriteResult):
    """DCP's note of a written tensor with the entry of its file, which travels to the coordinator with it."""

    file: str
    entry: FileEntry


class _Writer(dcp.FileSystemWriter):
    """A DCP writer whose last act, on the coordinating rank and after all ranks have written, is the commit.

    DCP reports an exception raised on any rank, in writing or in the commit, on every rank.
    """

    def __init__(self, folder: Path, commit: Callable[[dict[str, TensorEntry], dict[str, FileEntry]], None]):
        super().__init__(folder, single_file_per_rank=True, sync_files=True)
        self.fs = _DigestingFileSystem()
        self._commit = commit

    def stage(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        # A fresh tensor each: torch's own stager hands back 0-dim DTensors uncopied and fails on views with an offset.
        self.per_thread_copy_ahead = 0
        return {name: _on_cpu(tensor.detach()) for name, tensor in state_dict.items()}

    def set_up_storage_writer(self, *arguments: Any, **options: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            # A second team of OpenMP threads would outnumber the cores; the training's team then sleeps at every
            # barrier instead of spinning, for good: steps took 2.5 times as long after the first save on 2 cores.
            torch.set_num_threads(1)
        super().set_up_storage_writer(*arguments, **options)

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            written = super().write_data(plan, planner)
        except RuntimeError as error:
            raise _behind(error) from None
        return written.then(lambda future: [self._digested(result) for result in future.value()])

    def _digested(self, result: WriteResult) -> _DigestedResult:
        file = result.storage_data.relative_path
        return _DigestedResult(result.index, result.size_in_bytes, result.storage_data, file, self.fs.written[file])

    def finish(self, metadata: Metadata, results: list[list[_DigestedResult]]) -> None:
        super().finish(metadata, results)
        files = {result.file: result.entry for of_rank in results for result in of_rank}
        files[".metadata"] = describe_file(Path(self.path) / ".metadata")
        tensors = {
            name: TensorEntry(tuple(entry.size), dtype_name(entry.properties.dtype))
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._commit(tensors, files)


@dataclass(frozen=True)
class _Flight:
    """A save that has begun."""

    folder: Path
    num_bytes: int
    future: Future


class Saver:
    """Writes the checkpoints of one run, one at a time.

    Args:
        root: The run's `checkpoints/` folder; must exist.
        tokenizer: SentencePiece model to keep in each checkpoint.
        group: Process group with a CPU backend over all ranks that hold parts of the state. Nothing else may use it
            while a save is in flight. None is for one process.
        on_commit: Called on the first rank with the folder after the pointer has moved to it.
    """

    def __init__(
        self,
        root: Path,
        *,
        tokenizer: Path | None = None,
        group: dist.ProcessGroup | None = None,
        on_commit: Callable[[Path], None] | None = None,
    ):
        self.root = root
        self._tokenizer = tokenizer
        self._group = group
        self._on_commit = on_commit
        self._flight: _Flight | None = None

    def save(self, step: int, state: Mapping[str, Any], manifest: Manifest, *, blocking: bool) -> None:
        """Save a state, waiting first for the save in flight.

        Args:
            step: Optimizer steps done.
            state: Tensors, flat or nested in dicts. Without `blocking` they are copied before this returns.
            manifest: Manifest whose `progress` (with the same `step`), `config` and `identity` are kept.
            blocking: Whether to return only when the checkpoint is complete.

        Raises:
            CheckpointError: If this save (or the one before it, when that ran in the background) failed.
        """
        assert manifest.step == step
        self.wait()
        tensors = flatten(state)
        folder = self.root / folder_name(step)
        writer = _Writer(self.root / f"{TEMPORARY}{folder.name}", partial(self._commit, folder, manifest))
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self._flight = _Flight(folder, num_bytes, self._start(writer, tensors, blocking))
        if blocking:
            self.wait()

    def _start(self, writer: _Writer, tensors: dict[str, Tensor], blocking: bool) -> Future:
        ignore_single_process_warning()
        future: Future = Future()
        try:
            if not blocking:
                return dcp.async_save(tensors, storage_writer=writer, process_group=self._group)
            future.set_result(dcp.save(tensors, storage_writer=writer, process_group=self._group))
        except (OSError, RuntimeError, MemoryError, dcp.CheckpointException) as error:
            future.set_exception(error)
        return future

    def poll(self) -> Path | None:
        """Return the folder of a background save that has completed and that nothing has waited for, else None.

        Raises:
            CheckpointError: If that save failed.
        """
        return self.wait() if self._flight and self._flight.future.done() else None

    def wait(self) -> Path | None:
        """Wait for the save in flight; return its folder, or None when there was none.

        Raises:
            CheckpointError: If that save failed. Its temporary files are gone, earlier checkpoints untouched.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return None
        error = flight.future.exception()
        if error is not None:
            raise self._failure(flight, _root_cause(error)) from error
        return flight.folder

    def _commit(
        self, folder: Path, manifest: Manifest, tensors: dict[str, TensorEntry], files: dict[str, FileEntry]
    ) -> None:
        temporary = self.root / f"{TEMPORARY}{folder.name}"
        if self._tokenizer is not None:
            write_synced(temporary / TOKENIZER, self._tokenizer.read_bytes())
            files = {**files, TOKENIZER: describe_file(temporary / TOKENIZER)}
        versions = {"hopescale": hopescale.__version__, "torch": torch.__version__}
        manifest = replace(manifest, versions=versions, tensors=tensors, files=files)
        write_synced(temporary / MANIFEST, to_json(manifest).encode())
        sync(temporary)
        self._publish(temporary, folder)
        if self._on_commit:
            self._on_commit(folder)

    def _publish(self, temporary: Path, folder: Path) -> None:
        replaced = self.root / f"{REPLACED}{folder.name}"
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
        sync(self.root)
        write_synced(self.root / f"{TEMPORARY}{POINTER}", f"{folder.name}\n".encode())
        (self.root / f"{TEMPORARY}{POINTER}").rename(self.root / POINTER)
        sync(self.root)
        shutil.rmtree(replaced, ignore_errors=True)

    def _failure(self, flight: _Flight, cause: BaseException) -> CheckpointError:
        if self._group is None or dist.get_rank(self._group) == 0:
            shutil.rmtree(self.root / f"{TEMPORARY}{flight.folder.name}", ignore_errors=True)
            (self.root / f"{TEMPORARY}{POINTER}").unlink(missing_ok=True)
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else f"{type(cause).__name__}: {cause}"
        good = read_pointer(self.root)
        size, free = format_bytes(flight.num_bytes), format_bytes(shutil.disk_usage(self.root).free)
        message = (
            f"cannot write {flight.folder}: {reason} (the state has {size}, {free} are free now); "
            f"last good checkpoint: {good.name if good else 'none'}"
        )
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space or lower checkpoint.keep_last" if full else "remove the cause"
        return CheckpointError(message, f"{remedy}, then repeat the command to continue from the last good one")


def _on_cpu(tensor: Tensor) -> Tensor:
    """Copy a tensor, or this rank's part of a distributed one, to the CPU."""
    if not isinstance(tensor, DTensor):
        return tensor.to("cpu", copy=True)
    ranks = DeviceMesh.from_group(tensor.device_mesh.get_group(), "cpu")
    return DTensor.from_local(tensor.to_local().to("cpu", copy=True), ranks, tensor.placements, run_check=False)


def _behind(error: BaseException) -> BaseException:
    """Return the operating system's error that torch.save's own failure hides, or the failure itself."""
    context: BaseException | None = error
    while context is not None and not isinstance(context, OSError):
        context = context.__context__
    return context or error


def _root_cause(error: BaseException) -> BaseException:
    """Unwrap the first rank's failure from DCP's collection; a stop by the user stays one."""
    if not isinstance(error, dcp.CheckpointException):
        return error
    cause, _ = error.failures[min(error.failures)]
    if not isinstance(cause, Exception):
        raise cause
    return cause
