"""Parameters of one shape that are updated together: weights, gradients and masters side by side in stacks."""

from __future__ import annotations

from collections.abc import Sequence
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

    A step reads and writes whole stacks of what this replica owns, and copies nothing to make them.

    Args:
        names: Names of all parameters, in the order of their owners.
        own: Names of those that belong to this replica.
        weights: Their weights `[k, ...]`; each parameter is a view.
        gradients: `[k, ...]` float32, their sums since the last update.
        grams: `[k, ...]` float32, likewise, of Gram matrices or columns of them; None if they gather none.
        slices: Distribution of what belongs to this replica over tensor-parallel ranks; None if it is whole here, or
            matrices as they are.

    Attributes:
        mastered: Names of what this rank updates.
        master: `[m, ...]` float32, these; the `weights` themselves where that can be.
    """

    def __init__(
        self,
        names: Sequence[str],
        own: Sequence[str],
        weights: Tensor,
        gradients: Tensor,
        grams: Tensor | None,
        slices: Slices | None,
    ):
        self.names, self.slices = list(names), slices
        self.weights, self.gradients, self.grams = weights, gradients, grams
        self.mastered = list(own) if slices is None else list(own)[slices.mine]
        self.master = nn.Parameter(self._wholes(self.weights.float()))

    def _wholes(self, parts: Tensor) -> Tensor:
        return parts if self.slices is None or not len(parts) else self.slices.join(parts)

    def set_master(self) -> None:
        """Set the master to the weights. All tensor-parallel ranks call."""
        self.master.copy_(self._wholes(self.weights.float()))

    @property
    def sums(self) -> list[Tensor]:
        """Sums that belong to this replica: gradients, and Gram matrices if there are any."""
        return [self.gradients] if self.grams is None else [self.gradients, self.grams]

    def give_sums(self) -> None:
        """Give the master the wholes of the sums, as `grad` and `gram`. All tensor-parallel ranks call."""
        grad, *gram = [self._wholes(sums) for sums in self.sums]
        if self.mastered:
            self.master.grad, self.master.gram = grad, gram[0] if gram else None

    def take_sums(self) -> None:
        """Let the master have no sums, after an update."""
        self.master.grad = self.master.gram = None

    def cut_weights(self) -> None:
        """Set the weights that belong to this replica to the master's slices. All tensor-parallel ranks call."""
        if len(self.weights):
            self.slices.cut(self.master.detach(), self.weights)
