"""Everything a resume needs: tensors for the checkpoint, numbers for its manifest."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hopescale.checkpoint.load import load_into
from hopescale.checkpoint.manifest import Manifest, fingerprint, read_manifest
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
        self._config_tree = to_dict(config)

    @property
    def tokens_seen(self) -> int:
        """Training tokens read so far."""
        return self.step * self.config.train.global_batch_tokens

    @property
    def on_cuda(self) -> bool:
        """Whether the model is on a CUDA device."""
        return next(self.model.parameters()).is_cuda

    def levels_never_due(self) -> set[str]:
        """Return the levels that no step of the run updates."""
        steps, accumulators = self.config.train.steps, self.optimizer.accumulators
        members = self.model.level_parameters().items()
        return {level for level, names in members if not accumulators[names[0]].cadence.updates(steps)}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the state's tensors; loading copies into them."""
        generators = {"cpu": torch.get_rng_state()}
        if self.on_cuda:
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
            config=self._config_tree,
            identity=self.identity(),
        )

    def identity(self) -> dict[str, str]:
        """Return fingerprints of what a run keeps for life."""
        return {"model": fingerprint(self._config_tree["model"]), "data": self.data.fingerprint}

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint whose identity has been compared."""
        tensors = self.tensors()
        # The other kind of device has another set of generators; a run may move between them.
        generators = _generators_of(read_manifest(folder))
        manifest = load_into(tensors | {"generators": generators}, folder)
        torch.set_rng_state(generators["cpu"])
        if self.on_cuda and "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"])
        self.step = manifest.step
        self.watch.load_state_dict(manifest.progress["watch"])


def _generators_of(manifest: Manifest) -> dict[str, Tensor]:
    """Return room for the states of the generators that a checkpoint holds."""
    entries = {name: entry for name, entry in manifest.tensors.items() if name.startswith("generators.")}
    return {name.partition(".")[2]: torch.empty(entry.shape, dtype=torch.uint8) for name, entry in entries.items()}
