"""When a run's state is saved and how it is committed, which checkpoint a resume takes, and which ones are kept."""

from __future__ import annotations

import difflib
import errno
import logging
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

import hopescale
from hopescale.checkpoint.manifest import (
    MANIFEST,
    POINTER,
    FileEntry,
    Listener,
    Manifest,
    TensorEntry,
    checkpoint_folders,
    describe_file,
    folder_name,
    incomplete_because,
    read_pointer,
    step_of,
    to_json,
)
from hopescale.checkpoint.mirror import Mirror
from hopescale.checkpoint.save import Writer, flatten, ignore_single_process_warning
from hopescale.common.disk import sync, write_synced
from hopescale.common.errors import CheckpointError
from hopescale.common.units import format_bytes
from hopescale.config.schema import CheckpointConfig
from hopescale.parallel.control import Control

TEMPORARY = ".tmp-"
REPLACED = ".replaced-"

logger = logging.getLogger(__name__)


def latest_checkpoint(root: Path) -> Path | None:
    """Return the checkpoint to continue from: the one `latest` names, else the newest complete one.

    A fallback is reported as a logged warning. With a pointer, only checkpoints up to its step are considered: later
    ones belong to a course of the run that was given up. Changes nothing on the disk.

    Args:
        root: A `checkpoints/` folder; need not exist.

    Raises:
        CheckpointError: If there are checkpoints but none is complete.
    """
    pointed = read_pointer(root)
    folders = checkpoint_folders(root)
    if pointed is None and not folders:
        return None
    problem = incomplete_because(pointed) if pointed else f"{root} has no readable pointer `latest`"
    if problem is None:
        return pointed
    problems = [problem]
    for folder in reversed(folders):
        if folder == pointed or (pointed and step_of(folder) > step_of(pointed)):
            continue
        reason = incomplete_because(folder)
        if reason is None:
            logger.warning("%s; taking %s instead", problem, folder.name)
            return folder
        problems.append(reason)
    raise CheckpointError(f"no complete checkpoint in {root}: {'; '.join(problems)}", "--resume never starts anew")


def newest_before(root: Path, step: int) -> Path | None:
    """Return the newest complete checkpoint of a step before `step`, None if there is none.

    Those beyond the pointer's step belong to a course of the run that was given up.
    """
    pointed = read_pointer(root)
    end = step if pointed is None else min(step, step_of(pointed) + 1)
    folders = (folder for folder in reversed(checkpoint_folders(root)) if step_of(folder) < end)
    return next((folder for folder in folders if incomplete_because(folder) is None), None)


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a path means: itself, or the latest of a run folder or a `checkpoints/` folder.

    Raises:
        CheckpointError: If there is none.
    """
    if (path / MANIFEST).exists() or step_of(path.resolve()) is not None:
        reason = incomplete_because(path)
        if reason is None:
            return path
        raise CheckpointError(reason, _available(path.parent))
    for root in (path / "checkpoints", path):
        if (found := latest_checkpoint(root)) is not None:
            return found
    if not path.exists():
        message = f"{path} holds no checkpoint, as there is no such folder{_like(path)}"
        raise CheckpointError(message, "name a run folder or a checkpoints/step-* folder")
    raise CheckpointError(f"{path} holds no checkpoint", "name a run folder or a checkpoints/step-* folder")


def _like(path: Path) -> str:
    """Name the entries beside a path that does not exist which are spelled like it, in brackets."""
    if not path.parent.is_dir():
        return f" (nor {path.parent})"
    names = [entry.name for entry in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=3)
    return f" ({path.parent} holds {', '.join(close)})" if close else ""


def _available(root: Path) -> str:
    names = [folder.name for folder in checkpoint_folders(root) if incomplete_because(folder) is None]
    return f"complete ones in {root}: {', '.join(names) or 'none'}"


@dataclass(frozen=True)
class _Flight:
    """A save that has begun."""

    folder: Path
    num_bytes: int
    future: Future


class CheckpointManager:
    """The checkpoints of a run that is being trained, saved one at a time. Only one may exist for a folder at a time.

    A save writes into a temporary folder, which one rename puts in place; then the pointer moves to it. Construction
    creates the folder and removes what an interrupted save left there. To read the checkpoints of a run that somebody
    else may be training, use `latest_checkpoint` and `find_checkpoint`.

    Args:
        folder: The run's `checkpoints/`.
        config: Times of saves, and number of checkpoints to keep.
        tokenizer: Files of the tokenizer, to keep in each checkpoint.
        group: Process group with a CPU backend over all ranks that hold parts of the state. Nothing else may use it
            while a save is in flight. None is for one process.

    Raises:
        CheckpointError: If the folder cannot be made or cleaned.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        *,
        tokenizer: Sequence[Path] = (),
        group: dist.ProcessGroup | None = None,
    ):
        self.folder, self.config = folder, config
        self._tokenizer, self._group = tokenizer, group
        self._flight: _Flight | None = None
        if group is None:
            self._prepare()
        else:
            Control(group).broadcast_from_rank0(self._prepare)

    def due(self, step: int, last_step: int) -> bool:
        """Say whether the state after `step` steps is to be saved: at multiples of `every` and at the last step."""
        return step == last_step or (self.config.every is not None and step > 0 and step % self.config.every == 0)

    def must_keep(self, step: int) -> bool:
        """Say whether the state after `step` steps must be saved in any case, because `keep_at` names the step."""
        return step in self.config.keep_at

    def save(
        self,
        step: int,
        state: Mapping[str, Any],
        manifest: Manifest,
        *,
        blocking: bool = False,
        on_written: Listener = lambda num_bytes: None,
    ) -> None:
        """Save a state, waiting first for the save in flight.

        Args:
            step: Optimizer steps done.
            state: Tensors, flat or nested in dicts. For a save in the background they are copied before this returns.
            manifest: Manifest whose `progress` (with the same `step`), `config` and `identity` are kept.
            blocking: Whether to return only when the checkpoint is complete, whatever the config says.
            on_written: Listener for the bytes that this rank writes.

        Raises:
            CheckpointError: If this save (or the one before it, when that ran in the background) failed.
        """
        assert manifest.step == step
        self.wait()
        blocking = blocking or not self.config.async_save
        tensors = flatten(state)
        folder = self.folder / folder_name(step)
        writer = Writer(self.folder / f"{TEMPORARY}{folder.name}", partial(self._commit, folder, manifest), on_written)
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        self._flight = _Flight(folder, num_bytes, self._start(writer, tensors, blocking))
        if blocking:
            self.wait()

    def _start(self, writer: Writer, tensors: dict[str, Tensor], blocking: bool) -> Future:
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
        temporary = self.folder / f"{TEMPORARY}{folder.name}"
        for file in self._tokenizer:
            write_synced(temporary / file.name, file.read_bytes())
            files = {**files, file.name: describe_file(temporary / file.name)}
        versions = {"hopescale": hopescale.__version__, "torch": torch.__version__}
        manifest = replace(manifest, versions=versions, tensors=tensors, files=files)
        write_synced(temporary / MANIFEST, to_json(manifest).encode())
        sync(temporary)
        self._publish(temporary, folder)
        self._retain(folder)
        if self.config.mirror is not None:
            names = ("keep_last", "keep_every", "keep_at")
            Mirror(self.config.mirror).send(folder, **{name: getattr(self.config, name) for name in names})

    def _publish(self, temporary: Path, folder: Path) -> None:
        replaced = self.folder / f"{REPLACED}{folder.name}"
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
        sync(self.folder)
        write_synced(self.folder / f"{TEMPORARY}{POINTER}", f"{folder.name}\n".encode())
        (self.folder / f"{TEMPORARY}{POINTER}").rename(self.folder / POINTER)
        sync(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _failure(self, flight: _Flight, cause: BaseException) -> CheckpointError:
        if self._group is None or dist.get_rank(self._group) == 0:
            shutil.rmtree(self.folder / f"{TEMPORARY}{flight.folder.name}", ignore_errors=True)
            (self.folder / f"{TEMPORARY}{POINTER}").unlink(missing_ok=True)
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else f"{type(cause).__name__}: {cause}"
        good = read_pointer(self.folder)
        size, free = format_bytes(flight.num_bytes), format_bytes(shutil.disk_usage(self.folder).free)
        message = (
            f"cannot write {flight.folder}: {reason} (the state has {size}, {free} are free now); "
            f"last good checkpoint: {good.name if good else 'none'}"
        )
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free some space or lower checkpoint.keep_last" if full else "remove the cause"
        return CheckpointError(message, f"{remedy}, then repeat the command to continue from the last good one")

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for replaced in self.folder.glob(f"{REPLACED}*"):
                target = self.folder / replaced.name.removeprefix(REPLACED)
                shutil.rmtree(replaced) if target.exists() else replaced.rename(target)
            for leftover in self.folder.glob(f"{TEMPORARY}*"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        except OSError as error:
            hint = "the run folder must be writable and on a disk that is not full"
            raise CheckpointError(f"cannot prepare {self.folder}: {error.strerror}", hint) from error

    def _retain(self, current: Path) -> None:
        """Remove old checkpoints, keeping `current`; what cannot be removed is reported and left."""
        complete = [path for path in checkpoint_folders(self.folder) if step_of(path) <= step_of(current)]
        complete = [path for path in complete if path == current or incomplete_because(path) is None]
        complete = [path for path in complete if not self.must_keep(step_of(path))]
        for folder in complete[: -self.config.keep_last]:
            if self.config.keep_every is not None and step_of(folder) % self.config.keep_every == 0:
                continue
            try:
                shutil.rmtree(folder.rename(self.folder / f"{TEMPORARY}removed-{folder.name}"))
            except OSError as error:
                logger.warning("cannot remove the old checkpoint %s: %s", folder, error.strerror)


def _root_cause(error: BaseException) -> BaseException:
    """Unwrap the first rank's failure from DCP's collection; a stop by the user stays one."""
    if not isinstance(error, dcp.CheckpointException):
        return error
    cause, _ = error.failures[min(error.failures)]
    if not isinstance(cause, Exception):
        raise cause
    return cause
