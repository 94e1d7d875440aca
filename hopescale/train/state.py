"""Everything a resume needs: tensors for the checkpoint, numbers for its manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hopescale.checkpoint.load import load_into
from hopescale.checkpoint.manifest import Manifest, TensorEntry, fingerprint, read_manifest
from hopescale.checkpoint.save import flatten
from hopescale.common.errors import CheckpointError
from hopescale.config.load import to_dict
from hopescale.config.schema import RunConfig
from hopescale.data.loader import Data
from hopescale.models import Model
from hopescale.observe.health import LossWatch
from hopescale.optim import Cadence, OuterOptimizer, cadences_of_level
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.slices import as_whole

MAX_SUMS = 8
"""Up to so many replicas, each one's running sums of slow levels are saved apart, so that a resume is bit-equal. More
are added up first: a checkpoint must not grow with the number of replicas."""


class TrainState:
    """The state of a run, gathered from the objects that own it.

    Args:
        config: The resolved config, kept in every manifest.
        slices: This rank's slices of the model; weights are saved under `model.`.
        optimizer: Masters and moments, and the levels' gradient sums, which are saved under `optimizer.`.
        data: Identity of the data; its position follows from the step.
        watch: Recent losses.
        shapes: Shape of every parameter of the whole model, by name.

    Attributes:
        step: Optimizer steps done.
        passed_steps: Steps whose batches were passed over in favour of later ones, when the run went back.
        returns: Times the run has gone back to a checkpoint.
    """

    def __init__(
        self,
        config: RunConfig,
        slices: Sequence[Model],
        optimizer: OuterOptimizer,
        data: Data,
        watch: LossWatch,
        shapes: Mapping[str, Sequence[int]],
    ):
        self.slices, self.optimizer = list(slices), optimizer
        self.data, self.watch, self.shapes = data, watch, dict(shapes)
        self.step = self.passed_steps = self.returns = 0
        self.settle(config)

    def settle(self, config: RunConfig) -> None:
        """Take over the config with a number in place of a micro batch that was `auto`: nothing was built by that."""
        self.config, self._config_tree = config, to_dict(config)

    @property
    def mesh(self) -> Mesh:
        """The ranks of the run."""
        return self.optimizer.mesh

    @property
    def checkpoint_group(self) -> dist.ProcessGroup | None:
        """The ranks that save and load together; None for one alone."""
        return None if self.mesh.checkpoint_group.size() == 1 else self.mesh.checkpoint_group

    @property
    def tokens_seen(self) -> int:
        """Training tokens read so far."""
        return self.step * self.config.train.global_batch_tokens

    @property
    def sizes(self) -> dict[str, int]:
        """Entries of every parameter of the whole model, by name."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters by name."""
        return self.optimizer.parameters

    @property
    def levels(self) -> dict[str, list[str]]:
        """This rank's parameter names of each level, fast to slow."""
        result: dict[str, list[str]] = {}
        for model in self.slices:
            for level, names in model.level_parameters().items():
                result.setdefault(level, []).extend(names)
        return result

    @property
    def cadences(self) -> dict[str, set[Cadence]]:
        """The cadences of each level in the whole model."""
        model = self.config.model
        return {level: set(cadences_of_level(model, level).values()) for level in model.cms.levels}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return this rank's part of a checkpoint; of equal copies one replica has it. Called by all ranks."""
        mesh = self.mesh
        elsewhere = set() if mesh.is_first_stage else set(self.optimizer.tied)
        weights, state = self.optimizer.to_save()
        parts = {"model": weights, "optimizer": state | self._sums()}
        return {
            kind: self._whole(
                {name: part for name, part in tensors.items() if parameter_of(name, kind) not in elsewhere}
            )
            for kind, tensors in parts.items()
        } | {"generators": self._generators() if mesh.control.is_first else {}}

    def _whole(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make slices of parameters, and of tensors split like them, parts of the whole."""
        result = {}
        for name, part in parts.items():
            parameter = name if name in self.parameters else parameter_of(name, "optimizer")
            is_state = parameter != name and ".accumulator." not in name
            whole = part.dim() == 0 or (is_state and self.optimizer.holds_whole(parameter))
            split = None if whole else self._split_of(name)
            result[name] = as_whole(part, split, self.mesh)
        return result

    def _split_of(self, name: str) -> int | None:
        """Return the dimension along which a parameter, or a tensor of its shape, or its gradient sum, is split."""
        parameter = name if name in self.parameters else parameter_of(name, "optimizer")
        split = self.parameters[parameter].spec.partition_dim
        # A Gram matrix has the columns of the parameter.
        return None if split == 0 and ".gram.accumulator." in name else split

    def _sums(self) -> dict[str, Tensor]:
        """Return the running sums of slow levels, `<parameter>.accumulator.<replica>`, and of Gram matrices, which have
        `.gram` before it, and of totals that wait for their updates, which have `.sent`."""
        group, sums = self.mesh.dp_group, self.optimizer.sums()
        replica = group.rank()
        if group.size() > MAX_SUMS and self.config.parallel.stage < 2:
            for total in sums.values():
                dist.all_reduce(total, group=group)
                if replica:
                    total.zero_()
            self.optimizer.load_sums(sums, self.step)
            if replica:
                return {}
        return {f"{name}.accumulator.{replica}": total for name, total in sums.items()}

    def _room_for_sums(self, saved: Mapping[str, TensorEntry]) -> dict[str, Tensor]:
        """Return tensors for the saved sums that this rank takes over: those of replicas with its remainder."""
        group, room = self.mesh.dp_group, {}
        for name, entry in sorted(saved.items()):
            name = name.removeprefix("optimizer.")
            key, _, replica = name.rpartition(".accumulator.")
            parameter = key.removesuffix(".gram").removesuffix(".sent")
            if parameter in self.parameters and int(replica) % group.size() == group.rank():
                shape, split = list(entry.shape), self._split_of(name)
                if split is not None:
                    shape[split] //= self.mesh.tp_group.size()
                room[name] = torch.zeros(shape, device=self.parameters[parameter].device)
        return room

    def _generators(self) -> dict[str, Tensor]:
        generators = {"cpu": torch.get_rng_state()}
        if next(iter(self.parameters.values())).is_cuda:
            generators["cuda"] = torch.cuda.get_rng_state()
        return generators

    def manifest(self) -> Manifest:
        """Return the state's numbers."""
        progress = {"step": self.step, "tokens_seen": self.tokens_seen, "watch": self.watch.state_dict()}
        progress["dropped_at"] = self.optimizer.dropped_at
        return Manifest(
            progress=progress | {"recovery": self.recovery()},
            config=self._config_tree,
            identity=self.identity(),
        )

    def identity(self) -> dict[str, str]:
        """Return fingerprints of the parts of a run that may not change."""
        return {"model": fingerprint(self._config_tree["model"]), "data": self.data.fingerprint}

    def own_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that this rank alone needs to continue on the same layout, flat. Called by all ranks."""
        kinds = {
            "model": self.optimizer.weights(),
            "optimizer": self.optimizer.state_dict(),
            "sums": self.optimizer.sums(),
            "generators": self._generators(),
        }
        return flatten(kinds)

    def on_their_way(self, manifest: Manifest) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the totals that `own_tensors` has at a manifest's step, and perhaps not at the present.

        They wait there for their updates.
        """
        names = self.optimizer.on_their_way(manifest.step, manifest.progress.get("dropped_at", 0))
        return {f"sums.{name}.sent": tuple(self.parameters[name].shape) for name in names}

    def continue_from(self, tensors: Mapping[str, Tensor], manifest: Manifest) -> None:
        """Load the tensors that `own_tensors` returned here, and the numbers beside them. Called by all ranks."""
        kinds: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "sums": {}, "generators": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            kinds[kind][rest] = tensor
        self.optimizer.load(kinds["model"], kinds["optimizer"])
        self.optimizer.dropped_at = manifest.progress.get("dropped_at", 0)
        self.optimizer.load_sums(kinds["sums"], manifest.step)
        # torch takes the state of a generator from the start of its storage, whatever the tensor is a view of.
        self._continue(manifest, {name: tensor.clone() for name, tensor in kinds["generators"].items()})

    def begin_from(self, folder: Path) -> None:
        """Take the weights of a checkpoint of any layout and of an equal model. Called by all ranks.

        Raises:
            CheckpointError: If it is damaged, or its weights are others.
        """
        weights = self.optimizer.weights()
        load_into({"model": self._whole(weights)}, folder, prefix="model.", group=self.checkpoint_group)
        self.optimizer.load(weights)

    def restore(self, folder: Path, *, reset_optimizer: bool = False) -> None:
        """Continue from a checkpoint of any layout, whose identity has been compared. Called by all ranks.

        With `reset_optimizer` moments, masters and running sums stay as they begin, from the saved weights.
        """
        found, weights = read_manifest(folder), self.optimizer.weights()
        saved, state, sums = found.tensors, {}, {}
        if not reset_optimizer:
            self.mesh.control.all_ranks_or_raise(lambda: self._require_sums(found, folder))
            state, sums = self.optimizer.state_dict(), self._room_for_sums(saved)
        # The other kind of device has another set of generators; a run may move between them.
        generators = {
            name.partition(".")[2]: torch.empty(entry.shape, dtype=torch.uint8)
            for name, entry in saved.items()
            if name.startswith("generators.")
        }
        tensors = {
            "model": self._whole(weights),
            "optimizer": self._whole(state | sums),
            "generators": generators,
        }
        manifest = load_into(
            tensors,
            folder,
            prefix=("model.", "generators.") if reset_optimizer else "",
            group=self.checkpoint_group,
        )
        self.optimizer.load(weights, None if reset_optimizer else state)
        totals: dict[str, Tensor] = {}
        for name, part in sums.items():
            key, _, _ = name.rpartition(".accumulator.")
            totals[key] = totals[key] + part if key in totals else part
        # A new optimizer has no sums of periods before.
        self.optimizer.dropped_at = manifest.step if reset_optimizer else manifest.progress.get("dropped_at", 0)
        self.optimizer.load_sums(totals, manifest.step)
        self._continue(manifest, generators)

    def _require_sums(self, manifest: Manifest, folder: Path) -> None:
        """Refuse a checkpoint without a sum that waits for its update after its step."""
        kept = {name.rpartition(".accumulator.")[0].replace("optimizer.", "sums.", 1) for name in manifest.tensors}
        if missing := sorted(self.on_their_way(manifest).keys() - kept):
            name = missing[0].removeprefix("sums.").removesuffix(".sent")
            message = f"{folder} lacks the sum of {name} that waits for its update after step {manifest.step}"
            raise CheckpointError(message, "continue with the weights alone: --reset-optimizer, once")

    def _continue(self, manifest: Manifest, generators: Mapping[str, Tensor]) -> None:
        if "cpu" in generators:
            torch.set_rng_state(generators["cpu"])
        if "cuda" in generators and next(iter(self.parameters.values())).is_cuda:
            torch.cuda.set_rng_state(generators["cuda"])
        self.step = manifest.step
        self.watch.load_state_dict(manifest.progress["watch"])
        self.load_recovery(manifest.progress.get("recovery", {}))

    def recovery(self) -> dict[str, Any]:
        """Return the changes that returns to checkpoints have made, fit for JSON."""
        factor = self.optimizer.rate_factor
        return {"returns": self.returns, "passed_steps": self.passed_steps, "rate_factor": factor}

    def load_recovery(self, recovery: Mapping[str, Any]) -> None:
        """Load the changes that `recovery` has returned; a run that never went back may have none."""
        self.returns, self.passed_steps = recovery.get("returns", 0), recovery.get("passed_steps", 0)
        self.optimizer.rate_factor = recovery.get("rate_factor", 1.0)


def parameter_of(name: str, kind: str) -> str:
    """Return the parameter that a saved tensor belongs to: all of its name if `kind` is `model`.

    Names of kind `optimizer` are `<parameter>.exp_avg`, `<parameter>.accumulator.0`, `<parameter>.gram.accumulator.0`,
    `<parameter>.sent.accumulator.0`.
    """
    if kind == "model":
        return name
    parameter, _, last = name.rpartition(".")
    if not last.isdigit():
        return parameter
    return parameter.removesuffix(".accumulator").removesuffix(".gram").removesuffix(".sent")
