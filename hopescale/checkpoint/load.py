"""Reading a checkpoint into given tensors, strictly: same names, same shapes, same dtypes, undamaged files."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from hopescale.checkpoint.manifest import Manifest, TensorEntry, damaged, file_problems, read_manifest
from hopescale.checkpoint.save import dtype_name, flatten, ignore_single_process_warning
from hopescale.common.errors import CheckpointError
from hopescale.parallel.control import Control

_SHOWN = 8


def load_into(
    state: Mapping[str, Any],
    folder: Path,
    *,
    prefix: str | tuple[str, ...] = "",
    group: dist.ProcessGroup | None = None,
) -> Manifest:
    """Verify a checkpoint, then copy its tensors in place into those of `state`.

    Nothing is written before every file has been compared with its SHA-256 and every name, shape and dtype matches.

    Args:
        state: Tensors to fill, flat or nested in dicts, on any device.
        folder: A checkpoint folder.
        prefix: Loads only tensors whose name starts with it (`model.`), or with one of several; `state` must hold all
            of those and no others.
        group: Process group with a CPU backend over all ranks that load together, each its own part. None is for one
            process, which must hold all of the state.

    Raises:
        CheckpointError: If files are missing, truncated or changed, or if names, shapes or dtypes differ; every
            difference is listed, on every rank.
    """
    manifest = read_manifest(folder)
    tensors = flatten(state)
    _verify_files(folder, manifest, group)
    _verify_fit(tensors, manifest, folder, prefix, group)
    _read(tensors, folder, group)
    return manifest


def read_tensors(folder: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Read some tensors, whole, of a checkpoint that has passed `verify`; needs memory for them alone."""
    entries = read_manifest(folder).tensors
    tensors = {name: torch.empty(entries[name].shape, dtype=getattr(torch, entries[name].dtype)) for name in names}
    _read(tensors, folder, None)
    return tensors


def _read(tensors: dict[str, Tensor], folder: Path, group: dist.ProcessGroup | None) -> None:
    with warnings.catch_warnings(), _one_thread():
        ignore_single_process_warning()
        try:
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), process_group=group)
        except (Exception, dcp.CheckpointException) as error:
            raise CheckpointError(f"cannot read the tensors of {folder}: {first_line(error)}") from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keep DCP's reading threads from making teams of OpenMP threads of their own, which slow all later work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def verify(folder: Path) -> Manifest:
    """Read every byte of a checkpoint and compare it with the manifest.

    Raises:
        CheckpointError: If a file is missing, truncated or changed.
    """
    manifest = read_manifest(folder)
    _verify_files(folder, manifest, None)
    return manifest


def _verify_files(folder: Path, manifest: Manifest, group: dist.ProcessGroup | None) -> None:
    names = sorted(manifest.files)
    if group is not None:
        names = names[dist.get_rank(group) :: dist.get_world_size(group)]
    found = file_problems(folder, {name: manifest.files[name] for name in names}, digests=True)
    problems = [problem for of_rank in _gather(found, group) for problem in of_rank]
    if problems:
        raise damaged(folder, problems)


def _verify_fit(
    tensors: Mapping[str, Tensor],
    manifest: Manifest,
    folder: Path,
    prefix: str | tuple[str, ...],
    group: dist.ProcessGroup | None,
) -> None:
    wanted = {name: TensorEntry(tuple(t.shape), dtype_name(t.dtype)) for name, t in tensors.items()}
    wanted = {name: entry for of_rank in _gather(wanted, group) for name, entry in of_rank.items()}
    saved = {name: entry for name, entry in manifest.tensors.items() if name.startswith(prefix)}
    groups = {
        "in the checkpoint, not in this run": sorted(saved.keys() - wanted.keys()),
        "in this run, not in the checkpoint": sorted(wanted.keys() - saved.keys()),
        "different": [
            f"{name} (checkpoint {saved[name]}, run {wanted[name]})"
            for name in sorted(saved.keys() & wanted.keys())
            if saved[name] != wanted[name]
        ],
    }
    lines = [f"{title}: {_listed(names)}" for title, names in groups.items() if names]
    if lines:
        hint = f"train.precision and the model must be those of the config in {folder / 'manifest.json'}"
        raise CheckpointError(f"{folder} does not fit this run; " + "; ".join(lines), hint)


def _gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Collect a value from every rank; just this one without a group."""
    return [value] if group is None else Control(group).gather(value)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown


def first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message, or the first two if that ends in a colon."""
    if isinstance(error, dcp.CheckpointException):
        error, _ = error.failures[min(error.failures)]
    first, *rest = f"{type(error).__name__}: {error}".splitlines()
    return f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first
