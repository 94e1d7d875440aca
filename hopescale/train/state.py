"""Everything a resume needs: tensors for the checkpoint, numbers for its manifest."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hopescale.checkpoint.load import load_into
from hopescale.checkpoint.manifest import Manifest, fingerprint
from hopescale.config.load import to_dict
from hopescale.config.schema import RunConfig
from hopescale.data.loader import Data
from hopescale.models import Model
from hopescale.observe.health import LossWatch
from hopescale.optim import OuterOptimizer


class TrainState:
    """The state of a run, gathered from the objects that own it.

    Args:
        config: The resolved config, kept in every manifest.
        model: Weights, under `model.`.
        optimizer: Masters, moments and the levels' gradient sums, under `optimizer.`.
        data: Identity of the data; its position follows from the step.
        watch: Losses seen lately.
    """

    def __init__(self, config: RunConfig, model: Model, optimizer: OuterOptimizer, data: Data, watch: LossWatch):
        self.config, self.model, self.optimizer, self.data, self.watch = config, model, optimizer, data, watch
        self.step = 0

    @property
    def tokens_seen(self) -> int:
        """Training tokens read so far."""
        return self.step * self.config.train.global_batch_tokens

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the state's tensors; loading copies into them."""
        generators = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            generators["cuda"] = torch.cuda.get_rng_state()
        return {
            "model": {name: parameter.detach() for name, parameter in self.model.named_parameters()},
            "optimizer": self.optimizer.state_dict(),
            "generators": generators,
        }

    def manifest(self) -> Manifest:
        """Return the state's numbers."""
        return Manifest(
            progress={"step": self.step, "tokens_seen": self.tokens_seen, "watch": self.watch.state_dict()},
            config=to_dict(self.config),
            identity=self.identity(),
        )

    def identity(self) -> dict[str, str]:
        """Return fingerprints of what a run keeps for life."""
        return {"model": fingerprint(to_dict(self.config)["model"]), "data": self.data.fingerprint}

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint whose identity has been compared."""
        tensors = self.tensors()
        manifest = load_into(tensors, folder)
        torch.set_rng_state(tensors["generators"]["cpu"])
        if "cuda" in tensors["generators"]:
            torch.cuda.set_rng_state(tensors["generators"]["cuda"])
        self.step = manifest.step
        self.watch.load_state_dict(manifest.progress["watch"])
