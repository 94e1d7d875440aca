"""Writing the tensors of a checkpoint: DCP files, each with its size and SHA-256. `manager.py` commits them."""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hopescale.checkpoint.manifest import FileEntry, Listener, TensorEntry, describe_file


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
    """A file open for writing that updates a digest with every write, and reports the bytes to a listener."""

    def __init__(self, stream: BinaryIO, on_written: Listener):
        self._stream, self._on_written = stream, on_written
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.sha256.update(data)
        written = self._stream.write(data)
        self._on_written(written)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _DigestingFileSystem(FileSystem):
    """DCP's file system, remembering size and SHA-256 of each file it wrote."""

    def __init__(self, on_written: Listener) -> None:
        self._on_written = on_written
        self.written: dict[str, FileEntry] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[_DigestingStream]:
        with super().create_stream(path, mode) as raw:
            stream = _DigestingStream(raw, self._on_written)
            yield stream
        size = os.stat(path).st_size
        self.written[Path(path).name] = FileEntry(size, stream.sha256.hexdigest())


@dataclass(frozen=True)
class _DigestedResult(WriteResult):
    """DCP's note of a written tensor with the entry of its file, which travels to the coordinator with it."""

    entry: FileEntry


class Writer(dcp.FileSystemWriter):
    """A DCP writer whose last act, on the coordinating rank and after all ranks have written, is the commit.

    DCP reports an exception raised on any rank, in writing or in the commit, on every rank.
    """

    def __init__(
        self,
        folder: Path,
        commit: Callable[[dict[str, TensorEntry], dict[str, FileEntry]], None],
        on_written: Listener = lambda num_bytes: None,
    ):
        super().__init__(folder, single_file_per_rank=True, sync_files=True)
        self.fs = _DigestingFileSystem(on_written)
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
        entry = self.fs.written[result.storage_data.relative_path]
        return _DigestedResult(result.index, result.size_in_bytes, result.storage_data, entry)

    def finish(self, metadata: Metadata, results: list[list[_DigestedResult]]) -> None:
        super().finish(metadata, results)
        files = {result.storage_data.relative_path: result.entry for of_rank in results for result in of_rank}
        files[".metadata"] = describe_file(Path(self.path) / ".metadata")
        tensors = {
            name: TensorEntry(tuple(entry.size), dtype_name(entry.properties.dtype))
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._commit(tensors, files)


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
