"""The checkpoints of a run in the memory of its nodes: opened, and continued from after a failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from hopescale.checkpoint.manifest import Manifest, fingerprint, step_of
from hopescale.checkpoint.memory import MemoryCheckpoints
from hopescale.checkpoint.save import dtype_name
from hopescale.config.load import from_dict
from hopescale.train.state import TrainState


def open_memory(state: TrainState, checkpoints: Path) -> MemoryCheckpoints | None:
    """Open the run's checkpoints in memory; None if it keeps none. Called by all ranks."""
    settings, mesh = state.config.checkpoint.memory, state.mesh
    if settings.every is None:
        return None
    return MemoryCheckpoints(settings, checkpoints, mesh.control_group)


def continue_from_memory(
    state: TrainState, memory: MemoryCheckpoints, on_disk: Path | None, report: Callable[[str], None]
) -> bool:
    """Continue from memory if that is later than the checkpoint on disk, and return whether. Called by all ranks.

    What does not fit is not used: parts of another config or layout, and what some rank does not have whole.
    """
    own, shapes = _fingerprint(state.manifest()), _shapes(state.own_tensors())
    now = state.on_their_way(state.manifest())
    lasting = {name: shape for name, shape in shapes.items() if name not in now}

    def misfit(tensors: Mapping[str, Tensor], manifest: Manifest) -> str | None:
        moved = state.data.other_order(from_dict(manifest.config, "memory").data)
        if _fingerprint(manifest) != own or moved:
            return moved or "the config or the data has changed since"
        late = {name: ("float32", shape) for name, shape in state.on_their_way(manifest).items()}
        return None if _shapes(tensors) == lasting | late else "it is of another layout"

    part = memory.load(misfit, after=-1 if on_disk is None else step_of(on_disk))
    if part is None:
        return False
    state.continue_from(*part)
    where = "there is none on disk" if on_disk is None else f"on disk there is {on_disk.name}"
    report(f"resumed from the memory of the nodes at step {state.step}; {where}")
    return True


def _fingerprint(manifest: Manifest) -> str:
    return fingerprint([manifest.config, manifest.identity])


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items()}
