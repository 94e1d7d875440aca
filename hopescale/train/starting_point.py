"""The checkpoint that a start begins with: in its run folder, at its mirror, or another run's."""

from __future__ import annotations

from pathlib import Path

from hopescale.checkpoint.manager import find_checkpoint, latest_checkpoint
from hopescale.checkpoint.manifest import (
    Manifest,
    checkpoint_folders,
    fingerprint,
    incomplete_because,
    read_manifest,
    read_pointer,
)
from hopescale.checkpoint.mirror import Mirror
from hopescale.common.errors import CheckpointError
from hopescale.config.load import to_dict
from hopescale.train.folder import RunFolder
from hopescale.train.request import RunRequest


def choose_checkpoint(folder: RunFolder, request: RunRequest, *, writes: bool = True) -> Path | None:
    """Return the checkpoint to continue from, or None for a new run.

    A run that branches off another begins at the other's checkpoint, and continues from its own. Without `writes`
    nothing is fetched from `checkpoint.mirror`, and what would be is returned.

    Raises:
        CheckpointError: If the folder does not hold what `resume` asks for, or no checkpoint for a new optimizer, or
            `checkpoint.mirror` cannot be reached.
    """
    resume = request.resume
    if isinstance(resume, Path):
        checkpoint = find_checkpoint(resume)
        _begin_mirror(folder, request, writes=writes)
        return checkpoint
    if resume == "never" and (latest := latest_checkpoint(folder.checkpoints)) is not None:
        hint = "choose another --run-dir, or leave --resume out to continue it"
        raise CheckpointError(f"--resume never, but {folder.path} already holds {latest.name}", hint)
    fetched = _begin_mirror(folder, request, writes=writes)
    latest = fetched or latest_checkpoint(folder.checkpoints)
    if resume == "must" and latest is None:
        raise CheckpointError(f"--resume must, but {folder.checkpoints} holds no checkpoint", "check --run-dir")
    if request.reset_optimizer and latest is None:
        hint = "a new run has a new optimizer; leave the option out, or check --run-dir"
        raise CheckpointError(f"--reset-optimizer, but {folder.checkpoints} holds no checkpoint", hint)
    if latest is None and request.branch_from is not None:
        return find_checkpoint(request.branch_from)
    return latest


def manifest_ahead(request: RunRequest, checkpoint: Path) -> Manifest:
    """Read the manifest of what `choose_checkpoint` returned without writing, which may lie at the mirror alone.

    Raises:
        CheckpointError: If it cannot be read.
    """
    mirror = request.loaded.config.checkpoint.mirror
    if mirror is None or incomplete_because(checkpoint) is None:
        return read_manifest(checkpoint)
    return Mirror(mirror).manifest(checkpoint.name)


def finds_weights(folder: RunFolder, request: RunRequest) -> bool:
    """Tell whether a start takes weights from a checkpoint, so that none have to be drawn. Changes nothing."""
    if request.init is not None or isinstance(request.resume, Path):
        return True
    return read_pointer(folder.checkpoints) is not None or bool(checkpoint_folders(folder.checkpoints))


def _begin_mirror(folder: RunFolder, request: RunRequest, *, writes: bool) -> Path | None:
    """Make `checkpoint.mirror` the run's own, and fetch from it if the run may go on from what is there.

    Without `writes` it refuses what a start would, and changes nothing.

    Returns:
        The checkpoint that was fetched, or would be; None if there was no need to.
    """
    settings, root = request.loaded.config.checkpoint, folder.checkpoints
    if settings.mirror is None:
        return None
    mirror, goes_on = Mirror(settings.mirror), not isinstance(request.resume, Path)
    if request.resume == "never":
        mirror.check_unused(root)
    branch = _branch_id(request) if goes_on else None
    if not writes:
        return mirror.check(root, adopts=goes_on, branch=branch)
    if not goes_on:
        mirror.claim(root)
        return None
    keeps = {name: getattr(settings, name) for name in ("keep_last", "keep_every", "keep_at")}
    return mirror.begin(root, **keeps, branch=branch)


def _branch_id(request: RunRequest) -> str | None:
    """Return the id of a run that branches off another, the same for the same start; None for other runs.

    A branch goes on from what it is told, not from the copies of whatever run is at its mirror; by this it knows its
    own, when its folder is lost.
    """
    if request.branch_from is None:
        return None
    return fingerprint([str(request.branch_from), to_dict(request.loaded.config)])[:32]
