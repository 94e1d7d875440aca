"""The updaters behind the outer optimizer, which keep masters and state of its parameters: their common base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hopescale.optim.cadence import Accumulator, Cadence
from hopescale.optim.gate import StepGate
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.node_flat import NodeFlat

Scales = Mapping[str, Tensor | float]
"""Factor on the gradient of each parameter."""
Rates = Mapping[str, float]
"""Learning rate of each group."""


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


def even_shares(sizes: Mapping[str, int], replicas: int) -> dict[str, int]:
    """Give each parameter to a replica, so that all have about as many entries."""
    entries, result = [0] * replicas, {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        result[name] = entries.index(min(entries))
        entries[result[name]] += sizes[name]
    return result


def scale_together(tensors: Sequence[Tensor], factors: Sequence[Tensor | float]) -> None:
    """Multiply tensors in place by their factors, all that share one at once."""
    alike: dict[int, list[int]] = {}
    for place, factor in enumerate(factors):
        alike.setdefault(id(factor), []).append(place)
    for places in alike.values():
        torch._foreach_mul_([tensors[place] for place in places], factors[places[0]])


class Updater(ABC):
    """Accumulates the gradients of its parameters, keeps their float32 masters and rule state, whole or sharded.

    A step is: backward passes, `reduce(due)`, `square_norms(...)`, `update(due, ...)`. What is not due accumulates on.
    In the last backward pass sums may `begin` as soon as their gradients are there.
    Calls that communicate are made by all data-parallel ranks with the same names in the same order.

    A checkpoint sees `weights`, `state_dict` and `sums`, whose tensors `load` and `load_sums` take when they have been
    filled. What is written here does for state that lies whole on every replica, or belongs to one.

    Args:
        parameters: Parameters by name; their gradients are taken from them as soon as they are complete.
        cadences: Cadence of every parameter.
        mesh: Ranks of this process.
        accumulates: Whether gradients are accumulated here; not if something else takes them.
        buffers: Float32 zeros in which some of them accumulate, by name.
        wakes: Functions to call before a buffer is used, by name.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        cadences: Mapping[str, Cadence],
        mesh: Mesh,
        *,
        accumulates: bool = True,
        buffers: Mapping[str, Tensor] | None = None,
        wakes: Mapping[str, Callable[[], None]] | None = None,
    ):
        self.parameters, self.dp_group, self.cadences = dict(parameters), mesh.dp_group, dict(cadences)
        self._deferred: set[str] = set()
        self._on_their_way: list[tuple[Collection[str], Callable[[], None]]] = []
        self.accumulators: dict[str, Accumulator] = {}
        for name, parameter in self.parameters.items() if accumulates else ():
            given = {"wake": wakes[name]} if wakes and name in wakes else {}
            self.accumulators[name] = Accumulator(parameter, cadences[name], (buffers or {}).get(name), **given)
            parameter.register_post_accumulate_grad_hook(self.accumulators[name].take)

    def norm_weight(self, name: str) -> float:
        """Return the weight of this rank's part of a parameter in sums over all replicas: 1 where parts are disjoint.

        It is 1 on one replica and 0 on the others if each holds the whole.
        """
        return 1.0

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a micro batch; gradients are accumulated as they become complete."""
        loss.backward()

    def accumulated_grad(self, name: str) -> Tensor:
        """Return the sum of this rank's gradients of a parameter since its last update, to be changed in place."""
        return self.accumulators[name].accumulated_grad()

    def sums_of(self, names: Sequence[str]) -> list[list[str]]:
        """Return what `begin` takes of parameters that are due and reduced in one call; none if nothing can."""
        return []

    def begin(self, names: Sequence[str]) -> None:
        """Begin to sum the gradients of an entry of `sums_of`, before `reduce`: all of them are there."""
        raise NotImplementedError(f"{type(self).__name__} begins nothing before it reduces")

    @abstractmethod
    def reduce(self, names: Sequence[str]) -> None:
        """Sum the accumulated gradients of parameters that are due over the data-parallel ranks.

        What has begun is not begun again.
        """

    def send(self, names: Sequence[str]) -> None:
        """Take the sums of a period that has ended out, and begin to add them up over replicas, for a later update."""
        raise NotImplementedError(f"{type(self).__name__} updates what is due at once")

    def running_squares(self, names: Sequence[str]) -> Tensor:
        """Return the squared norm of what parameters that are due gather already for the period after: a scalar."""
        return torch.stack(torch._foreach_norm([self.accumulators[name].total for name in names])).square().sum()

    def hold(self, names: Sequence[str]) -> None:
        """Sum what waits for a later step inside the node, if it is summed there: none of it stays whole."""
        return

    def square_norms(self, names: Sequence[str]) -> Tensor:
        """Return the squared norm of the part of each accumulated gradient that is here, `[len(names)]` float32."""
        if not names:
            return torch.zeros(0)
        return torch.stack(torch._foreach_norm([self._gradient(name) for name in names])).square()

    def _gradient(self, name: str) -> Tensor:
        """Return the part of an accumulated gradient that is here."""
        return self.accumulated_grad(name)

    @property
    def is_gated(self) -> bool:
        """Whether `update` takes a gate."""
        return True

    @abstractmethod
    def update(self, names: Sequence[str], scales: Scales, rates: Rates, gate: StepGate | None = None) -> None:
        """Update parameters with their accumulated gradients, and begin a new period.

        Args:
            names: Names of all parameters that are due.
            scales: Factor on the gradient of each parameter.
            rates: Learning rate of each group.
            gate: Gate of a step that may be bad; none of a good one.
        """

    def drop_if_bad(self, names: Sequence[str], gate: StepGate) -> None:
        """Drop what parameters have gathered and no update has used up, if the step is bad."""
        totals = [self.accumulators[name].total for name in names]
        gate.clear([total for total in totals if total is not None])

    @abstractmethod
    def uncount(self, names: Sequence[str]) -> None:
        """Take back that a bad step has counted as an update of parameters."""

    def defer(self, names: Sequence[str]) -> None:
        """Let weights of parameters come from other replicas after `update` has returned, until `settle` names them."""
        self._deferred.update(names)

    def settle(self, names: Sequence[str] | None = None) -> None:
        """Wait for weights of parameters that are on their way, of all if none are named."""
        left = []
        for own, wait in self._on_their_way:
            if names is None or not set(own).isdisjoint(names):
                wait()
            else:
                left.append((own, wait))
        self._on_their_way = left

    def _settle_others(self, names: Sequence[str]) -> None:
        """Wait for weights that were not deferred."""
        self.settle([name for name in names if name not in self._deferred])

    def discard(self) -> None:
        """Drop all gradients, also those of parameters that are not due yet, and begin a new period."""
        for accumulator in self.accumulators.values():
            accumulator.clear()

    @abstractmethod
    def masters(self, names: Sequence[str]) -> list[Tensor]:
        """Return the parts of float32 masters that are here."""

    def holds_whole(self, name: str) -> bool:
        """Tell whether state of a parameter is of the whole parameter, not of this rank's tensor-parallel slice."""
        return False

    def node_flats(self) -> list[tuple[str, NodeFlat]]:
        """Return the weights that replicas of a node share out, each with the name of a parameter in it."""
        return []

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that a checkpoint takes from this rank, by parameter name."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's part of the masters of low-precision parameters and of the rule's state, by name."""

    def to_save(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return of `weights` and `state_dict` what this replica writes to a checkpoint: of equal copies one.

        All data-parallel ranks call.
        """
        weights = self.weights()
        return {name: weights[name] for name in self._saved_here() if name in weights}, self.state_dict()

    def _saved_here(self) -> list[str]:
        """Return the parameters whose copies this replica is the one to write; all write about as many entries."""
        sizes = {name: parameter.numel() for name, parameter in self.parameters.items()}
        writers = even_shares(sizes, self.dp_group.size())
        return [name for name, replica in writers.items() if replica == self.dp_group.rank()]

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], state: Mapping[str, Tensor] | None = None) -> None:
        """Take over weights and state; without `state` masters become the weights, as in a new run."""
        self._load_weights(weights)
        whole = (name for name, parameter in self.parameters.items() if parameter.dtype == torch.float32)
        self._set_masters(self.parameters if state is None else whole)
        if state is not None:
            self._load_state(state)

    def _load_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])

    @abstractmethod
    def _set_masters(self, names: Iterable[str]) -> None:
        """Set the masters of some parameters to their weights."""

    def _load_state(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])

    def sums(self) -> dict[str, Tensor]:
        """Return the running sums of slow parameters, in parts that add up over replicas.

        A parameter's name has its gradient's sum; `<parameter>.gram` has that of its Gram matrix, split along its
        columns if the parameter's are, and `<parameter>.sent` the total of a period that waits for its update.
        """
        return self._running_sums() | {f"{name}.sent": total for name, total in self._sent_sums().items()}

    def _running_sums(self) -> dict[str, Tensor]:
        return {name: accumulator.total for name, accumulator in self.accumulators.items() if accumulator.persists}

    def _sent_sums(self) -> dict[str, Tensor]:
        """Return what adds up over replicas to the totals that wait for their updates. All replicas call."""
        return {}

    @torch.no_grad()
    def load_sums(self, sums: Mapping[str, Tensor], on_their_way: Collection[str] = ()) -> None:
        """Take over running sums, in parts that add up over replicas in any way; a missing sum is zero.

        `on_their_way` are the parameters that also have a total of a period before. All replicas call.
        """
        for name, total in self._running_sums().items():
            total.zero_() if name not in sums else total.copy_(sums[name])
        sent = {}
        for name, p in self._among(on_their_way).items():
            total = sums.get(f"{name}.sent")
            # Other replicas have the parts that make it up.
            sent[name] = torch.zeros_like(p, dtype=torch.float32) if total is None else total.to(p.device)
        self._send_again(sent)

    def _among(self, names: Collection[str]) -> dict[str, nn.Parameter]:
        chosen = set(names)
        return {name: parameter for name, parameter in self.parameters.items() if name in chosen}

    def _send_again(self, totals: Mapping[str, Tensor]) -> None:
        """Put totals, in parts that add up over replicas, in the place of all that are on their way."""
        assert not totals, f"{type(self).__name__} sends nothing for later"
