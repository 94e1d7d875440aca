"""Several updaters, each with parameters of its own, as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hopescale.optim.updater import Updater


class CompositeUpdater:
    """An `Updater` that hands every parameter to the one that keeps it, in a fixed order.

    Gradients are all accumulated by hooks in a single backward pass, which the first updater runs: updaters that must
    see the end of their own backward passes (ZeRO 2 and 3) cannot be part of one.

    Args:
        updaters: The updaters and the names of the parameters of each.
    """

    def __init__(self, updaters: Sequence[tuple[Updater, Sequence[str]]]):
        self.updaters = [updater for updater, _ in updaters]
        self._index = {name: index for index, (_, names) in enumerate(updaters) for name in names}

    def _of(self, name: str) -> Updater:
        return self.updaters[self._index[name]]

    def _parts(self, names: Sequence[str]) -> list[tuple[Updater, list[str]]]:
        """Return each updater's part of the names, in their order; none that is empty."""
        parts: list[list[str]] = [[] for _ in self.updaters]
        for name in names:
            parts[self._index[name]].append(name)
        return [(updater, part) for updater, part in zip(self.updaters, parts, strict=True) if part]

    def norm_weight(self, name: str) -> float:
        """Return the weight of this rank's part of a parameter in sums over replicas."""
        return self._of(name).norm_weight(name)

    def holds_whole(self, name: str) -> bool:
        """Tell whether state of a parameter is of the whole rather than of this rank's slice."""
        return self._of(name).holds_whole(name)

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a micro batch."""
        self.updaters[0].backward(loss)

    def accumulated_grad(self, name: str) -> Tensor:
        """Return the sum of a parameter's gradients since its last update."""
        return self._of(name).accumulated_grad(name)

    def reduce(self, names: Sequence[str]) -> None:
        """Sum accumulated gradients over replicas."""
        for updater, part in self._parts(names):
            updater.reduce(part)

    def square_norms(self, names: Sequence[str]) -> Tensor:
        """Return the squared norm of the part of each accumulated gradient that is here, `[len(names)]`."""
        if not names:
            return torch.zeros(0)
        norms: dict[str, Tensor] = {}
        for updater, part in self._parts(names):
            norms |= zip(part, updater.square_norms(part).unbind(), strict=True)
        return torch.stack([norms[name] for name in names])

    def update(self, names: Sequence[str], scales: Mapping[str, Tensor | float], rates: Mapping[str, float]) -> None:
        """Update parameters with their accumulated gradients, and begin a new period."""
        for updater, part in self._parts(names):
            updater.update(part, scales, rates)

    def masters(self, names: Sequence[str]) -> list[Tensor]:
        """Return the parts of float32 masters that are here."""
        parts: dict[str, Tensor] = {}
        for updater, part in self._parts(names):
            parts |= zip(part, updater.masters(part), strict=True)
        return [parts[name] for name in names]

    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's part of masters and state of all."""
        return {name: tensor for updater in self.updaters for name, tensor in updater.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned; each updater picks its own."""
        for updater in self.updaters:
            updater.load_state_dict(state)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that a checkpoint takes from this rank."""
        return {name: tensor for updater in self.updaters for name, tensor in updater.weights().items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over what `weights` returned; each updater picks its own."""
        for updater in self.updaters:
            updater.load_weights(weights)

    def reset_masters(self) -> None:
        """Set masters to the weights."""
        for updater in self.updaters:
            updater.reset_masters()

    def sums(self) -> dict[str, Tensor]:
        """Return the running sums of slow parameters."""
        return {name: tensor for updater in self.updaters for name, tensor in updater.sums().items()}

    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Take over running sums; each updater picks its own."""
        for updater in self.updaters:
            updater.load_sums(sums)
