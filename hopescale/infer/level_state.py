"""Levels that have followed a text, as a folder of its own, apart from the weights: written, read, put into a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hopescale.checkpoint.manifest import Manifest, damaged, describe_file, file_problems, read_manifest, to_json
from hopescale.common.disk import replace_text, sync
from hopescale.common.errors import CheckpointError
from hopescale.infer.load import LoadedModel
from hopescale.infer.state import differences, entry_of, identity_of, read_tensors

LEVELS = "levels.json"
"""The manifest of levels: which model they belong to, what they have followed, and SHA-256 of the tensors."""
WEIGHTS, READER = "levels", "reader"
"""What begins the names of two files: the levels' weights, and what their reader needs to go on."""


def write_levels(
    folder: Path,
    loaded: LoadedModel,
    weights: Mapping[str, Tensor],
    reader: Mapping[str, Tensor],
    progress: Mapping[str, Any],
) -> None:
    """Write levels into a folder, in place of older ones of the same text; readers see the old ones or the new.

    Args:
        folder: Folder, which is made if it is missing.
        loaded: Model with the weights as they are trained.
        weights: Weights of the levels, `[1, *shape]` by the names of parameters.
        reader: Tensors that the reader of the text needs to go on.
        progress: Values that it needs besides, with `tokens_read`, as JSON can carry them.
    """
    parts = {WEIGHTS: weights, READER: reader}
    files = {f"{part}-{progress['tokens_read']}.pt": tensors for part, tensors in parts.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensors in files.items():
            # A clone is no part of a larger storage, which would be written with it.
            torch.save({key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}, folder / name)
            sync(folder / name)
        origin = {"step": loaded.manifest.step, "checkpoint": str(loaded.folder)}
        manifest = replace(
            Manifest({**origin, **progress}, loaded.manifest.config, identity_of(loaded)),
            versions=loaded.manifest.versions,
            tensors={name: entry_of(tensor) for name, tensor in weights.items()},
            files={name: describe_file(folder / name) for name in files},
        )
        replace_text(folder / LEVELS, to_json(manifest))
        for part in parts:
            for old in set(folder.glob(f"{part}-*.pt")) - {folder / name for name in files}:
                old.unlink()
    except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(f"cannot write {folder}: {reason}", "choose another folder, or free space") from error


def read_progress(folder: Path, loaded: LoadedModel) -> Manifest:
    """Read the note on the levels' model and progress, and check all files against it.

    Raises:
        CheckpointError: If the folder is missing or damaged, or belongs to another model, to other weights or to
            another tokenizer; every difference is listed.
    """
    if not (folder / LEVELS).is_file():
        hint = "levels are written by: hopescale adapt CHECKPOINT STREAM --out FOLDER"
        raise CheckpointError(f"{folder} holds no levels: there is no {LEVELS}", hint)
    manifest = read_manifest(folder, LEVELS)
    if problems := file_problems(folder, manifest.files, digests=True):
        raise damaged(folder, problems)
    if found := differences(manifest, loaded, folder, LEVELS):
        hint = "use the checkpoint they were adapted from, or adapt this one: hopescale adapt"
        raise CheckpointError(f"{folder} holds no levels of {loaded.folder}: {'; '.join(found)}", hint)
    return manifest


def read_file(folder: Path, manifest: Manifest, part: str, device: torch.device) -> dict[str, Tensor]:
    """Read the `WEIGHTS` or the `READER` of levels, whose manifest `read_progress` has checked, to a device."""
    return read_tensors(folder / f"{part}-{manifest.progress['tokens_read']}.pt", device)


def read_levels(folder: Path, loaded: LoadedModel) -> dict[str, Tensor]:
    """Read the weights of levels, float32 at least, by the names of parameters, in their shapes.

    Raises:
        CheckpointError: If `read_progress` refuses the folder, or the tensors are not those of the model's levels.
    """
    manifest, own = read_progress(folder, loaded), dict(loaded.model.named_parameters())
    tensors = read_file(folder, manifest, WEIGHTS, next(iter(own.values())).device)
    entries = {name: entry_of(tensor) for name, tensor in tensors.items()}
    fit = all(name in own and tensor.shape == (1, *own[name].shape) for name, tensor in tensors.items())
    if entries != manifest.tensors or not fit:
        raise damaged(folder, ["it holds other tensors than the model's levels"])
    return {name: tensor[0] for name, tensor in tensors.items()}


def put_levels(folder: Path, loaded: LoadedModel) -> None:
    """Put the levels of a folder in the place of the trained ones, in the model's precision. In place.

    From then on the model is one of other weights: what it has read, as states hold it, belongs to them.

    Raises:
        CheckpointError: Failures that `read_levels` names.
    """
    own = dict(loaded.model.named_parameters())
    for name, weight in read_levels(folder, loaded).items():
        own[name].data.copy_(weight)
    loaded.forget_digest()
