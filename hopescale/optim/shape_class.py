"""Parameters of one shape that are updated together: weights, gradients and masters side by side in stacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Slices:
    """Matrices of which every tensor-parallel rank has a slice; the ranks share the wholes out among themselves.

    Attributes:
        group: Tensor-parallel ranks.
        dim: Along which a matrix is cut, not counting that of the stack.
        counts: Number of wholes that belong to each rank, in the order of the stack.
    """

    group: dist.ProcessGroup
    dim: int
    counts: Sequence[int]

    @property
    def mine(self) -> slice:
        """Return where the wholes of this rank are among all."""
        rank = self.group.rank()
        return slice(sum(self.counts[:rank]), sum(self.counts[: rank + 1]))

    def join(self, slices: Tensor) -> Tensor:
        """Return the wholes of this rank, of slices `[k, ...]` of all. All ranks of the group call."""
        own, shape = self.counts[self.group.rank()], slices.shape[1:]
        received = slices.new_empty(self.group.size(), own, *shape)
        sizes = [count * shape.numel() for count in self.counts]
        even = [own * shape.numel()] * self.group.size()
        dist.all_to_all_single(received.view(-1), slices.reshape(-1), even, sizes, group=self.group)
        return torch.cat(received.unbind(), self.dim + 1)

    def cut(self, wholes: Tensor, slices: Tensor) -> None:
        """Fill the slices `[k, ...]` of all from the wholes of this rank. All ranks of the group call."""
        sent = torch.stack(wholes.to(slices.dtype).chunk(self.group.size(), self.dim + 1))
        sizes = [count * slices.shape[1:].numel() for count in self.counts]
        even = [sent[0].numel()] * self.group.size()
        dist.all_to_all_single(slices.view(-1), sent.view(-1), sizes, even, group=self.group)


class ShapeClass:
    """Parameters of one shape, type and group that are always updated together, as one parameter of the rule.

    A step reads and writes whole stacks and copies nothing to make them.

    Args:
        parameters: Parameters by name, in the order of the stacks; their storage is moved there.
        here: Range of them that belongs to this replica.
        slices: Distribution of these over tensor-parallel ranks; None if they are whole here, or matrices as they are.
        gram: Shape of the Gram matrix, or of the columns of it, that each parameter gathers of its inputs; None if it
            gathers none.

    Attributes:
        names: Names of the parameters.
        weights: `[K, ...]`; each parameter is a view.
        gradients: `[K, ...]` float32, sums since the last update.
        grams: `[K, *gram]` float32, likewise, of each parameter at `gram`; None if there are none.
        mastered: Names of what this rank updates.
        master: `[k, ...]` float32, these; a part of `weights` where that can be.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        here: slice,
        slices: Slices | None,
        gram: tuple[int, int] | None = None,
    ):
        self.names, self.here, self.slices = list(parameters), here, slices
        self.weights = torch.stack([parameter.detach() for parameter in parameters.values()])
        for parameter, view in zip(parameters.values(), self.weights, strict=True):
            parameter.data = view
        self.gradients = torch.zeros_like(self.weights, dtype=torch.float32)
        self.grams = None
        if gram is not None:
            self.grams = self.gradients.new_zeros(len(self.names), *gram)
            for parameter, view in zip(parameters.values(), self.grams, strict=True):
                parameter.gram = view
        self.mastered = self.names[here] if slices is None else self.names[here][slices.mine]
        self.master = nn.Parameter(self._wholes(self.weights[here].float()))
        self.master.parts = next(iter(parameters.values())).spec.parts

    def _wholes(self, parts: Tensor) -> Tensor:
        return parts if self.slices is None or not len(parts) else self.slices.join(parts)

    def set_master(self) -> None:
        """Set the master to the weights. All tensor-parallel ranks call."""
        self.master.copy_(self._wholes(self.weights[self.here].float()))

    def gradient(self, scale: Tensor | float) -> Tensor:
        """Scale the gradients that belong to this replica, and return the master's. All tensor-parallel ranks call."""
        return self._wholes(self.gradients[self.here].mul_(scale))

    def gram(self, scale: float) -> Tensor | None:
        """Do with Gram matrices, if there are any, what `gradient` does. All tensor-parallel ranks call."""
        return None if self.grams is None else self._wholes(self.grams[self.here].mul_(scale))

    def clear(self) -> None:
        """Begin a new period, with what belongs to this replica; the rest is zero since it was sent."""
        for sums in (self.gradients, self.grams):
            if sums is not None:
                sums[self.here].zero_()

    def set_weights(self) -> None:
        """Set the weights that belong to this replica to the master. All tensor-parallel ranks call."""
        weights = self.weights[self.here]
        if self.slices is not None and len(weights):
            self.slices.cut(self.master.detach(), weights)
        elif self.master.dtype != weights.dtype:
            weights.copy_(self.master)
