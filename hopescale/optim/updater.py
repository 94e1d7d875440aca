"""The interface between the outer optimizer and the updaters that keep masters and state of its parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class RuleGroup:
    """Parameters that share the settings of the update rule.

    Attributes:
        name: Name of the group in `optim.groups`.
        members: Parameter names.
        weight_decay: Decoupled weight decay per unit of learning rate.
        betas: Decay rates of the two moments of AdamW; None with another rule.
        rule: Name of the update rule.
    """

    name: str
    members: tuple[str, ...]
    weight_decay: float
    betas: tuple[float, float] | None
    rule: str = "adamw"

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return torch's parameter group of those tensors that belong to members, by their names."""
        chosen = [tensors[name] for name in self.members if name in tensors]
        group = {"params": chosen, "weight_decay": self.weight_decay, "name": self.name}
        return group if self.betas is None else group | {"betas": self.betas}


class Stepper(Protocol):
    """The half of an updater that takes steps.

    A step is: backward passes, `reduce(due)`, `square_norms(...)`, `update(due, ...)`. What is not due accumulates on.
    Calls that communicate are made by all data-parallel ranks with the same names in the same order.
    """

    parameters: Mapping[str, nn.Parameter]

    def norm_weight(self, name: str) -> float:
        """Return the weight of this rank's part of a parameter in sums over all replicas.

        It is 1 if parts are disjoint, or 1 on one replica and 0 on the others if each holds the whole.
        """

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a micro batch; gradients are accumulated as they become complete."""

    def accumulated_grad(self, name: str) -> Tensor:
        """Return the sum of this rank's gradients of a parameter since its last update, to be changed in place."""

    def reduce(self, names: Sequence[str]) -> None:
        """Sum the accumulated gradients of parameters that are due over the data-parallel ranks."""

    def square_norms(self, names: Sequence[str]) -> Tensor:
        """Return the squared norm of the part of each accumulated gradient that is here, `[len(names)]` float32."""

    def update(self, names: Sequence[str], scales: Mapping[str, Tensor | float], rates: Mapping[str, float]) -> None:
        """Update parameters with their accumulated gradients, and begin a new period.

        Args:
            names: Names of all parameters that are due.
            scales: Factor on the gradient of each parameter.
            rates: Learning rate of each group.
        """

    def masters(self, names: Sequence[str]) -> list[Tensor]:
        """Return the parts of float32 masters that are here."""


class Stateful(Protocol):
    """The half of an updater that a checkpoint sees.

    A `load_...` takes the tensors that its counterpart returned, after they have been filled.
    """

    def holds_whole(self, name: str) -> bool:
        """Tell whether state of a parameter is of the whole parameter, not of this rank's tensor-parallel slice."""

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that a checkpoint takes from this rank, by parameter name."""

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take over weights; before `load_state_dict`."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's part of the masters and the rule's state, by name; nothing of it may be a view."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over masters and state."""

    def reset_masters(self) -> None:
        """Set masters to the weights, as in a new run: in place of `load_state_dict`."""

    def sums(self) -> dict[str, Tensor]:
        """Return the running sums of slow parameters, in parts that add up over replicas.

        A parameter's name has its gradient's sum; `<parameter>.gram` has that of its Gram matrix, split along its
        columns if the parameter's are.
        """

    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Take over running sums, in parts that add up over replicas in any way; a missing sum is zero."""


class Updater(Stepper, Stateful, Protocol):
    """Accumulates the gradients of its parameters, keeps their float32 masters and rule state, whole or sharded."""
