"""A model and its tokenizer from a checkpoint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from hopescale.checkpoint.load import load_into
from hopescale.checkpoint.manager import find_checkpoint
from hopescale.checkpoint.manifest import Manifest, read_manifest
from hopescale.config.load import from_dict
from hopescale.config.schema import RunConfig
from hopescale.data.load_tokenizer import find_tokenizer
from hopescale.data.tokenizer import Tokenizer
from hopescale.models import Model
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.slices import as_whole, join_slices


@dataclass(frozen=True)
class LoadedModel:
    """The contents of a checkpoint for inference."""

    model: Model
    tokenizer: Tokenizer | None
    config: RunConfig
    manifest: Manifest
    folder: Path

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights as they were when it was first asked for, or since `forget_digest`."""
        return weights_digest(self.model)

    def forget_digest(self) -> None:
        """Take the digest anew when it is next asked for, as after a change of the weights."""
        vars(self).pop("digest", None)


def load_model(path: Path, device: torch.device, mesh: Mesh | None = None) -> LoadedModel:
    """Load the weights of a checkpoint, or of a run folder's latest, in the precision they were trained in.

    With a `mesh`, tensor-parallel ranks hold its parts. All of them call.

    Raises:
        CheckpointError: If there is no checkpoint, or it is damaged.
    """
    folder = find_checkpoint(path)
    manifest = read_manifest(folder)
    model = empty_model(manifest, folder, mesh)
    weights = {
        f"model.{name}": as_whole(p.detach(), p.spec.partition_dim, model.mesh) for name, p in model.named_parameters()
    }
    load_into(weights, folder, prefix="model.", group=model.mesh.control_group)
    return with_tokenizer(model, manifest, folder, device)


def empty_model(manifest: Manifest, folder: Path, mesh: Mesh | None = None) -> Model:
    """Return the model of a manifest in `folder`, in its precision, on the CPU; its weights are to be filled in.

    With a `mesh`, this rank's part of it.
    """
    config = from_dict(manifest.config, str(folder))
    model = Model(config.model, mesh=mesh)
    return model.to_precision(torch.bfloat16) if config.train.precision == "bf16" else model


def with_tokenizer(model: Model, manifest: Manifest, folder: Path, device: torch.device) -> LoadedModel:
    """Combine a filled model with the tokenizer beside it, in a folder whose files have been checked."""
    config = from_dict(manifest.config, str(folder))
    return LoadedModel(model.to(device).eval(), find_tokenizer(folder), config, manifest, folder)


def weights_digest(model: Model) -> str:
    """Return the SHA-256 of names, types, shapes and values of all weights: equal in a checkpoint and its export.

    Of a model that is split over tensor-parallel ranks all of them call.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        weight = join_slices(parameter.detach(), parameter.spec.partition_dim, model.mesh)
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}\n".encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
