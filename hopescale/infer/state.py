"""The memory of a read context as a folder of its own, apart from the weights: written, and read by the same model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hopescale.checkpoint.load import first_line
from hopescale.checkpoint.manifest import (
    Manifest,
    TensorEntry,
    damaged,
    describe_file,
    file_problems,
    read_manifest,
    to_json,
)
from hopescale.checkpoint.save import dtype_name
from hopescale.common.errors import CheckpointError
from hopescale.config.load import from_dict
from hopescale.config.show import model_problems
from hopescale.infer.generate import Reading
from hopescale.infer.load import LoadedModel
from hopescale.models import Model, ModelState

STATE = "state.json"
"""The manifest of a state: which model it belongs to, how much that has read, and size and SHA-256 of the tensors."""
TENSORS = "state.pt"


def write_state(reading: Reading, loaded: LoadedModel, folder: Path) -> None:
    """Write a model's state, and its prediction of the next token, into an empty folder."""
    tensors = {"logits": reading.logits, **named_tensors(reading.state)}
    # A clone is no part of a larger storage, which would be written with it, and keeps the order of its dimensions.
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    torch.save(tensors, folder / TENSORS)
    progress = {"step": loaded.manifest.step, "checkpoint": str(loaded.folder), "tokens_read": reading.state.position}
    manifest = replace(
        Manifest(progress, loaded.manifest.config, identity_of(loaded), versions=loaded.manifest.versions),
        tensors={name: entry_of(tensor) for name, tensor in tensors.items()},
        files={TENSORS: describe_file(folder / TENSORS)},
    )
    (folder / STATE).write_text(to_json(manifest), encoding="utf-8")


def read_state(folder: Path, loaded: LoadedModel) -> Reading:
    """Read a state that `write_state` has written, for a model to continue from.

    Raises:
        CheckpointError: If the folder is missing or damaged, or was written by another model, by other weights or with
            another tokenizer; every difference is listed.
    """
    if not (folder / STATE).is_file():
        hint = "a state is written by: hopescale generate CHECKPOINT --save-state STATE"
        raise CheckpointError(f"{folder} is no state: it holds no {STATE}", hint)
    manifest = read_manifest(folder, STATE)
    if problems := file_problems(folder, manifest.files, digests=True):
        raise damaged(folder, problems)
    if found := differences(manifest, loaded, folder, STATE):
        hint = "use the checkpoint it was written with, or let this one read the text again (--save-state)"
        raise CheckpointError(f"{folder} is no state of {loaded.folder}: {'; '.join(found)}", hint)
    tensors = read_tensors(folder / TENSORS, next(loaded.model.parameters()).device)
    if {name: entry_of(tensor) for name, tensor in tensors.items()} != manifest.tensors or not _fits(tensors, loaded):
        raise damaged(folder, [f"{TENSORS} holds other tensors than the model carries"])
    position, logits = manifest.progress["tokens_read"], tensors.pop("logits")
    return Reading(logits, state_of(tensors, loaded, logits.shape[0], position))


def state_of(tensors: Mapping[str, Tensor], loaded: LoadedModel, batch: int, position: int) -> ModelState:
    """Return the state of `batch` sequences after `position` tokens, from its `named_tensors`."""
    layers = [
        layer._replace(position=position).with_named({name: tensors[f"{i}.{name}"] for name in layer.named()})
        for i, layer in enumerate(loaded.model.initial_state(batch).layers)
    ]
    return ModelState(tuple(layers))


def named_tensors(state: ModelState) -> dict[str, Tensor]:
    """Return the tensors of a state by the names that files know."""
    return {f"{i}.{name}": tensor for i, layer in enumerate(state.layers) for name, tensor in layer.named().items()}


def splits_of(model: Model) -> dict[str, int]:
    """Return along which dimension `named_tensors` are split over tensor-parallel ranks; nothing of what is whole."""
    if model.mesh.tp_group.size() == 1:
        return {}
    with torch.device("meta"):
        wholes = named_tensors(Model(model.config).initial_state(1))
    result = {}
    for name, part in named_tensors(model.initial_state(1)).items():
        sizes = zip(part.shape, wholes[name].shape, strict=True)
        if differ := [dim for dim, (own, whole) in enumerate(sizes) if own != whole]:
            (result[name],) = differ
    return result


def entry_of(tensor: Tensor) -> TensorEntry:
    """Return shape and type of a tensor."""
    return TensorEntry(tuple(tensor.shape), dtype_name(tensor.dtype))


def identity_of(loaded: LoadedModel) -> dict[str, str]:
    """Return the identity of a model: a SHA-256 of its weights, and one of its tokenizer."""
    tokenizer = loaded.tokenizer
    digests = {"weights": loaded.digest}
    return digests if tokenizer is None else digests | {"tokenizer": tokenizer.fingerprint}


def differences(manifest: Manifest, loaded: LoadedModel, folder: Path, file: str) -> list[str]:
    """Say in which ways the model is not the one that wrote a `file`: its config, else its weights and tokenizer."""
    old = from_dict(manifest.config, str(folder / file))
    before, after = old.train.precision, loaded.config.train.precision
    found = [f"{problem.key} {problem.message}" for problem in model_problems(old, loaded.config, str(folder))]
    if before != after:
        found.append(f"train.precision is {after}, but {before} in {folder}")
    if found:
        return found
    origin = f"step {manifest.step} of {manifest.progress['checkpoint']}"
    identity = identity_of(loaded)
    return [
        f"the {what} {_shown(identity.get(what))}, but {_shown(manifest.identity.get(what))} in {folder} ({origin})"
        for what in ("weights", "tokenizer")
        if identity.get(what) != manifest.identity.get(what)
    ]


def _shown(digest: str | None) -> str:
    return "none" if digest is None else f"have the SHA-256 {digest[:12]}"


def read_tensors(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a file of tensors by name, to a device; a file that holds code is refused.

    Raises:
        CheckpointError: If it cannot be read.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch reports what it cannot read in many ways
        raise CheckpointError(f"cannot read {path}: {first_line(error)}") from error


def _fits(tensors: dict[str, Tensor], loaded: LoadedModel) -> bool:
    """Compare names and shapes with the model's own state; a dimension of 0 at the start grows with the tokens read."""
    rows = tensors["logits"].shape[0]
    expected = named_tensors(loaded.model.initial_state(rows))
    return tensors.keys() == {"logits", *expected} and all(
        all(wanted in (0, found) for wanted, found in zip(tensor.shape, tensors[name].shape, strict=True))
        for name, tensor in expected.items()
    )
