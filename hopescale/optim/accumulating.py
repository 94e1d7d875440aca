"""The common part of updaters that accumulate whole gradients on every replica."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hopescale.optim.cadence import Accumulator, Cadence
from hopescale.parallel.mesh import Mesh


class AccumulatingUpdater:
    """Takes the gradients of its parameters as soon as they are complete, and hands weights and state to checkpoints.

    Subclasses provide the rest of an `Updater` - `norm_weight`, `reduce`, `update`, `masters`, `state_dict` - and
    `_set_masters`.

    Args:
        parameters: Parameters by name.
        cadences: Cadence of every parameter.
        mesh: Ranks of this process.
        accumulates: Whether gradients are accumulated here; not if something else takes them.
        buffers: Float32 zeros in which some of them accumulate, by name.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        cadences: Mapping[str, Cadence],
        mesh: Mesh,
        *,
        accumulates: bool = True,
        buffers: Mapping[str, Tensor] | None = None,
    ):
        self.parameters, self.dp_group = dict(parameters), mesh.dp_group
        self.accumulators: dict[str, Accumulator] = {}
        for name, parameter in self.parameters.items() if accumulates else ():
            self.accumulators[name] = Accumulator(parameter, cadences[name], (buffers or {}).get(name))
            parameter.register_post_accumulate_grad_hook(self.accumulators[name].take)

    def holds_whole(self, name: str) -> bool:
        """Tell whether state of a parameter is of more than this rank's slice."""
        return False

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a micro batch."""
        loss.backward()

    def accumulated_grad(self, name: str) -> Tensor:
        """Return the sum of a parameter's gradients since its last update."""
        return self.accumulators[name].accumulated_grad()

    def square_norms(self, names: Sequence[str]) -> Tensor:
        """Return the squared norm of the part of each accumulated gradient that is here, `[len(names)]`."""
        if not names:
            return torch.zeros(0)
        return torch.stack(torch._foreach_norm([self._gradient(name) for name in names])).square()

    def _gradient(self, name: str) -> Tensor:
        """Return the part of an accumulated gradient that is here."""
        return self.accumulated_grad(name)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy what is not already in place."""
        for name, tensor in self.state_dict().items():
            if state[name] is not tensor:
                tensor.copy_(state[name])

    def weights(self) -> dict[str, Tensor]:
        """Return the weights, to be read or written in place."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy what is not already in place; masters of low-precision parameters are part of the state."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
        self._set_masters(name for name, parameter in self.parameters.items() if parameter.dtype == torch.float32)

    @torch.no_grad()
    def reset_masters(self) -> None:
        """Set masters to the weights."""
        self._set_masters(self.parameters)

    def _set_masters(self, names: Iterable[str]) -> None:
        """Set the masters of some parameters to their weights."""
        raise NotImplementedError

    def sums(self) -> dict[str, Tensor]:
        """Return the running sums of slow parameters."""
        return {name: accumulator.total for name, accumulator in self.accumulators.items() if accumulator.persists}

    @torch.no_grad()
    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Take over running sums, given in parts that add up over replicas; what is missing is zero."""
        for name, accumulator in self.accumulators.items():
            if not accumulator.persists:
                continue
            if name not in sums:
                accumulator.total.zero_()
            elif sums[name] is not accumulator.total:
                accumulator.total.copy_(sums[name])
