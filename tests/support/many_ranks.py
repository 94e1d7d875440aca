"""One rank of many in one process: what it would exchange is written down, and nothing is sent or computed.

Parameters are those of a recipe, on the device `meta`, so that their sizes are real and cost nothing. From the command
line it prints what a step of rank 0 does:

    python -m tests.support.many_ranks hope_1.3b 1024 parallel.zero=1
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hopescale.config.load import load_recipe
from hopescale.config.schema import RunConfig
from hopescale.cost.params import model_parameters
from hopescale.engine import Engine
from hopescale.engine.zero import ZeroAdamW
from hopescale.observe.health import Limit, StepLimits
from hopescale.ops.device import DTYPES
from hopescale.optim import Cadence, OuterOptimizer
from hopescale.optim.replicated import ReplicatedAdamW
from hopescale.parallel.layers import ParameterSpec, attach
from hopescale.parallel.mesh import Mesh

META = torch.device("meta")


class Group:
    """A process group that has a size, and nobody in it."""

    def __init__(self, size: int, rank: int = 0):
        self._size, self._rank = size, rank

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


class _Done:
    def __init__(self, order: list[tuple[str, int]], number: int):
        self._order, self._number = order, number

    def wait(self) -> None:
        self._order.append(("wait", self._number))


@dataclass
class Exchanges:
    """What a rank handed to collectives.

    Attributes:
        calls: Number of collectives by name.
        sent: Bytes by name: the whole input of a reduction, this rank's part of a gather.
        largest: Most bytes of a collective that lie in tensors made for it.
        host_reads: Reads of values on the device by the host.
        early: Bytes of gradients that were handed over before the last gradient of the backward pass was there.
        overlapped: Those that were handed over when three quarters of all entries of gradients were there.
        order: Exchanges by number, in the order in which the rank begins and waits for them.
    """

    calls: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    largest: int = 0
    host_reads: int = 0
    early: int = 0
    overlapped: int = 0
    order: list[tuple[str, int]] = field(default_factory=list)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of gradients that were handed over until now, and of some numbers."""
        return sum(self.sent[name] for name in ("all_reduce", "reduce_scatter_tensor"))


@contextmanager
def noted(lasting: Sequence[Tensor]) -> Iterator[Exchanges]:
    """Write down collectives and host reads; `lasting` tensors are there anyway, and so are views of them."""
    found, owned = Exchanges(), {tensor.untyped_storage()._cdata for tensor in lasting}

    def note(name: str, sent: int) -> Any:
        def collective(*tensors: Tensor, async_op: bool = False, **_: Any) -> _Done | None:
            tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
            found.calls[name] += 1
            found.sent[name] += tensors[sent].nbytes
            made = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
            found.largest = max(found.largest, sum(size for key, size in made.items() if key not in owned))
            number = sum(found.calls.values())
            found.order.append(("begin", number))
            done = _Done(found.order, number)
            return done if async_op else done.wait()

        return collective

    def read(tensor: Tensor) -> list[float]:
        found.host_reads += 1
        return [1.0] * tensor.numel()

    def item(tensor: Tensor) -> float:
        if tensor.device != META:
            return items(tensor)
        found.host_reads += 1
        return 0.0

    items = Tensor.item
    collectives = {"all_reduce": 0, "reduce_scatter_tensor": 1, "all_gather_into_tensor": 1, "all_to_all_single": 1}
    with (
        patch.multiple(dist, **{name: note(name, position) for name, position in collectives.items()}),
        patch.object(Tensor, "tolist", read),
        patch.object(Tensor, "item", item),
    ):
        yield found


class Calls(TorchDispatchMode):
    """Counts the operations of torch on the device, but for those that only look at a tensor otherwise or make one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        given = tree_leaves((arguments, options))
        is_there = any(isinstance(value, Tensor) and value.device == META for value in given)
        self.count += is_there and not function.is_view and "empty" not in function.__name__
        return function(*arguments, **(options or {}))


def mesh_of(replicas: Group, per_node: int = 1) -> Mesh:
    """Return the mesh of a rank whose model is whole on each of some replicas, of which nodes have some."""
    names = [each.name for each in fields(Mesh) if each.name.endswith("_group")]
    groups = {"dp_group": replicas, "world_group": replicas}
    if per_node > 1:
        groups |= {"node_group": Group(per_node), "nodes_group": Group(replicas.size() // per_node)}
    return Mesh(**dict.fromkeys(names, Group(1)) | groups)


class Loss:
    """Stands for the loss of a model: every parameter gets a gradient in its backward pass, those of the last first.

    Args:
        parameters: The parameters, in the order of the model.
        at_late: Function to call when three quarters of all entries have their gradients.
        at_last: Function to call before the last gradient.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], at_late: Callable[[], None], at_last: Callable[[], None]):
        self._parameters, self._at_late, self._at_last = parameters, at_late, at_last

    def backward(self) -> None:
        left = sum(map(Tensor.numel, self._parameters))
        quarter = left / 4
        for parameter in reversed(self._parameters):
            if parameter is self._parameters[0]:
                self._at_last()
            parameter.backward(torch.empty_like(parameter))
            if left > quarter >= left - parameter.numel():
                self._at_late()
            left -= parameter.numel()


class Rank:
    """Rank 0 of replicas, with all parameters of a recipe, that takes steps without a model.

    Args:
        config: Config of the run; `parallel.zero` is 0 or 1, or `parallel.shard` takes its place.
        replicas: Number of ranks.
        rank: Which of them it is.
    """

    def __init__(self, config: RunConfig, replicas: int, rank: int = 0):
        shapes = model_parameters(config.model)
        dtype = DTYPES[config.train.precision]
        self.parameters = {
            p.name: attach(
                nn.Parameter(torch.empty(p.shape, dtype=torch.float32 if p.keep_fp32 else dtype, device=META)),
                ParameterSpec(keep_fp32=p.keep_fp32),
            )
            for p in shapes
        }
        levels = {name: [p.name for p in shapes if p.level == name] for name in config.model.cms.levels}
        of_level = config.model.cms.levels
        cadences = {
            p.name: Cadence(of_level[p.level].update_every_steps, p.phase, of_level[p.level].lag)
            for p in shapes
            if p.level
        }
        mesh = mesh_of(Group(replicas, rank), config.parallel.ranks_per_node if config.parallel.shard == "node" else 1)

        def zero(*arguments: Any, **settings: Any) -> ZeroAdamW:
            entries = sum(map(Tensor.numel, self.parameters.values()))
            return ZeroAdamW(*arguments, stage=1, levels=list(levels.values()), entries=entries, **settings)

        numbers = range(config.model.num_layers) if config.parallel.shares_weights else ()
        self.optimizer = OuterOptimizer(
            self.parameters,
            config.optim,
            config.train.steps,
            cadences,
            mesh=mesh,
            updater=zero if config.parallel.stage else ReplicatedAdamW,
            levels=list(levels.values()),
            shared=[[p.name for p in shapes if p.block == number] for number in numbers],
        )
        self.engine = Engine(self, self.optimizer, levels, META)
        self._at_late: Callable[[], None] = lambda: None
        self._at_last = self._at_late

    def train(self, *_: Any) -> Tensor:
        """Stand for the passes of the model over one micro batch."""
        loss = Loss([*self.parameters.values()], lambda: self._at_late(), lambda: self._at_last())
        self.optimizer.backward(loss, is_last=True)
        return torch.zeros((), device=META)

    def due(self, step: int) -> int:
        """Return the entries that a step updates."""
        return sum(self.parameters[name].numel() for name in self.optimizer.due(step))

    def step(self, step: int) -> tuple[Exchanges, int]:
        """Take a step; return what it exchanged, and the number of operations by which the optimizer updates."""
        accumulators = {n: a for each in self.optimizer.updaters for n, a in each.accumulators.items()}
        flats = [accumulators[name].accumulated_grad() for name in self.parameters]
        with noted([*self.parameters.values(), *flats]) as found:

            def note(which: str) -> None:
                setattr(found, which, found.gradient_bytes)

            self._at_late, self._at_last = partial(note, "overlapped"), partial(note, "early")
            gradients, update, calls = self.engine.gradients(step, []), self.optimizer.step, Calls()

            def counted(*arguments: Any) -> None:
                with calls:
                    update(*arguments)

            with patch.object(self.optimizer, "step", counted):
                self.engine.update(step, gradients, limits=StepLimits(Limit(3.0, 1.0), Limit(0.0, 2.0)))
        return found, calls.count


def main(recipe: str, replicas: str, *overrides: str) -> None:
    """Print what a step of rank 0 does on which everything is due."""
    rank = Rank(load_recipe(recipe, list(overrides)).config, int(replicas))
    step = max(cadence.period for cadence in rank.optimizer.cadences.values())
    found, calls = rank.step(step)
    reduced = found.gradient_bytes
    sys.stdout.write(
        f"{replicas} ranks: {sum(found.calls.values())} collectives {dict(found.calls)}, largest buffer "
        f"{found.largest / 2**20:.1f} MiB, gradients {reduced / (4 * rank.due(step)):.4f} of 4 bytes per due entry, "
        f"{found.overlapped / reduced:.3f} of them begun when three quarters are there, {found.early / reduced:.3f} "
        f"before the last is there, {found.host_reads} host reads, {calls} operations in the update\n"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
