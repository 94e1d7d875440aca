"""When a run's state is saved, which checkpoint a resume takes, and which ones are kept."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hopescale.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    checkpoint_folders,
    folder_name,
    incomplete_because,
    read_pointer,
    step_of,
)
from hopescale.checkpoint.save import REPLACED, TEMPORARY, Saver
from hopescale.common.errors import CheckpointError
from hopescale.config.schema.train import CheckpointConfig

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
    raise CheckpointError(f"{path} holds no checkpoint", "name a run folder or a checkpoints/step-* folder")


def _available(root: Path) -> str:
    names = [folder.name for folder in checkpoint_folders(root) if incomplete_because(folder) is None]
    return f"complete ones in {root}: {', '.join(names) or 'none'}"


class CheckpointManager:
    """The checkpoints of a run that is being trained. Only one may exist for a folder at a time.

    Construction creates the folder and removes what an interrupted save left there. To read the checkpoints of a run
    that somebody else may be training, use `latest_checkpoint` and `find_checkpoint`.

    Args:
        folder: The run's `checkpoints/`.
        config: When to save and what to keep.
        tokenizer: SentencePiece model to keep in each checkpoint.
        group: See `Saver`.

    Raises:
        CheckpointError: If the folder cannot be made or cleaned.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        *,
        tokenizer: Path | None = None,
        group: dist.ProcessGroup | None = None,
    ):
        self.folder = folder
        self.config = config
        self._saver = Saver(folder, tokenizer=tokenizer, group=group, on_commit=self._retain)
        self._prepare_once(group)

    def latest(self) -> Path | None:
        """Return the checkpoint to continue from, or None in a new run; see `latest_checkpoint`."""
        return latest_checkpoint(self.folder)

    def find(self, which: int | Path) -> Path:
        """Return the complete checkpoint of a step or at a path.

        Raises:
            CheckpointError: If there is none; the hint names those there are.
        """
        return find_checkpoint(self.folder / folder_name(which) if isinstance(which, int) else which)

    def due(self, step: int, last_step: int) -> bool:
        """Say whether the state after `step` steps is to be saved: at multiples of `every` and at the last step."""
        return step == last_step or (self.config.every is not None and step > 0 and step % self.config.every == 0)

    def save(self, step: int, state: Mapping[str, Any], manifest: Manifest, *, blocking: bool = False) -> None:
        """Save a state, in the background if the config says so and `blocking` does not; see `Saver.save`."""
        self._saver.save(step, state, manifest, blocking=blocking or not self.config.async_save)

    def poll(self) -> Path | None:
        """Return the folder of a background save that has completed meanwhile; see `Saver.poll`."""
        return self._saver.poll()

    def wait(self) -> Path | None:
        """Wait for the save in flight, to be called before the process ends; see `Saver.wait`."""
        return self._saver.wait()

    def _prepare_once(self, group: dist.ProcessGroup | None) -> None:
        """Prepare the folder on the first rank; the others wait, and fail if it does."""
        failure: list[CheckpointError | None] = [None]
        if group is None or dist.get_rank(group) == 0:
            try:
                self._prepare()
            except CheckpointError as error:
                failure = [error]
        if group is not None:
            dist.broadcast_object_list(failure, src=0, group=group)
        if failure[0] is not None:
            raise failure[0]

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
        for folder in complete[: -self.config.keep_last]:
            if self.config.keep_every is not None and step_of(folder) % self.config.keep_every == 0:
                continue
            try:
                shutil.rmtree(folder.rename(self.folder / f"{TEMPORARY}removed-{folder.name}"))
            except OSError as error:
                logger.warning("cannot remove the old checkpoint %s: %s", folder, error.strerror)
