"""Update rules for matrices, shared out in whole matrices over replicas (layer-wise ZeRO, stage 1)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hopescale.config.schema import OptimConfig
from hopescale.optim.cadence import Cadence
from hopescale.optim.gathering import GatheringUpdater
from hopescale.optim.ownership import Work, buckets, share_out
from hopescale.optim.replicated import BUCKET_ELEMENTS
from hopescale.optim.rules import make_rule, update_cost
from hopescale.optim.updater import RuleGroup
from hopescale.parallel.mesh import Mesh


class LayerwiseUpdater(GatheringUpdater):
    """Rules that look at whole matrices, an `Updater` in which every matrix belongs to one replica.

    The owner alone holds float32 master and state of a matrix. Gradients gather on every replica, whole, and are summed
    at the owner when they are due; updated weights go from owners to all. What is not due sends nothing. Both take one
    exchange for all that is due together, or a few if that is much.

    Under tensor parallelism a matrix is this rank's slice, or with `tp_mode: gather` the whole: the tensor-parallel
    ranks of an owner share its matrices out among themselves, and exchange slices of gradients and weights. Matrices
    that are split between heads are whole on their rank as they are.

    Args:
        parameters: Parameters by name; their gradients are taken from them as soon as they are complete.
        groups: Which share settings and rule, every parameter in one.
        config: Settings of the rules, and `tp_mode`.
        cadences: Of every parameter.
        mesh: Where this process stands.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Sequence[RuleGroup],
        *,
        config: OptimConfig,
        cadences: Mapping[str, Cadence],
        mesh: Mesh,
    ):
        super().__init__(parameters, cadences, mesh)
        self.tp_group = mesh.tp_group
        gathers = config.tp_mode == "gather" and self.tp_group.size() > 1
        self._split = {name: p.spec.partition_dim for name, p in self.parameters.items()}
        self._gathered = {name for name, p in self.parameters.items() if gathers and _cuts_matrices(p)}
        work = self._work(groups, config, cadences)
        self.owners = share_out(work, self.dp_group.size())
        here = [each for each in work if self.owners[each.name] == self.dp_group.rank()]
        self.tp_owners = share_out([each for each in here if each.name in self._gathered], self.tp_group.size())
        self._masters = self._make_masters([each.name for each in here])
        self.rules = self._make_rules(groups, config)
        self._rule_of = {name: self.rules[g.rule] for g in groups for name in g.members if name in self._masters}
        self._reduced: set[str] = set()
        with torch.no_grad():
            self._gather_masters(self.tp_owners)

    def _work(self, groups: Sequence[RuleGroup], config: OptimConfig, cadences: Mapping[str, Cadence]) -> list[Work]:
        rule_of = {name: group.rule for group in groups for name in group.members}
        work = []
        for name in self.parameters:
            shape, rule = self._whole_shape(name), rule_of[name]
            work.append(Work(name, update_cost(rule, shape, config), (rule, shape), cadences[name]))
        return work

    def _whole_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape that is updated."""
        shape = list(self.parameters[name].shape)
        if name in self._gathered:
            shape[self._split[name]] *= self.tp_group.size()
        return tuple(shape)

    def _make_masters(self, names: Sequence[str]) -> dict[str, nn.Parameter]:
        masters = {}
        for name in names:
            parameter = self.parameters[name]
            if name in self._gathered:
                if self.tp_owners[name] == self.tp_group.rank():
                    empty = torch.empty(self._whole_shape(name), dtype=torch.float32, device=parameter.device)
                    masters[name] = nn.Parameter(empty)
            else:
                is_master = parameter.dtype == torch.float32
                masters[name] = parameter if is_master else nn.Parameter(parameter.detach().float())
        return masters

    def _make_rules(self, groups: Sequence[RuleGroup], config: OptimConfig) -> dict[str, torch.optim.Optimizer]:
        of_rule = defaultdict(list)
        for group in groups:
            here = group.of(self._masters)
            if here["params"]:
                of_rule[group.rule].append(here)
        return {rule: make_rule(rule, of_rule[rule], config) for rule in of_rule}

    def _gather_masters(self, names: Iterable[str]) -> None:
        """Set masters of gathered matrices to the weights."""
        slices = {name: self.parameters[name].detach().float() for name in names}
        for name, whole in self._gather_slices(slices).items():
            self._masters[name].copy_(whole)

    def _owns(self, name: str) -> bool:
        return self.owners[name] == self.dp_group.rank()

    def share(self, name: str) -> float:
        """Return 1: parts are disjoint."""
        return 1.0

    def holds_whole(self, name: str) -> bool:
        """Tell whether state of a parameter is of the whole rather than of this rank's slice."""
        return name in self._gathered

    def reduce(self, names: Sequence[str]) -> None:
        """Sum gathered gradients over replicas, each at the replica that owns it."""
        self._reduced.update(names)
        if self.dp_group.size() == 1:
            return
        for parts, room in self._buckets(names):
            flat = torch.zeros(len(parts), room, device=self._like(names).device)
            for part, place in zip(parts, flat, strict=True):
                _pack([self.gathered(name) for name in part], place)
            own = flat.new_empty(room)
            dist.reduce_scatter_tensor(own, flat.view(-1), group=self.dp_group)
            mine = [self.gathered(name) for name in parts[self.dp_group.rank()]]
            for tensor, total in zip(mine, _unpacked(own, mine), strict=True):
                tensor.copy_(total)
        for name in names:
            if not self._owns(name):
                self.accumulators[name].clear()

    def _buckets(self, names: Sequence[str]) -> list[tuple[list[list[str]], int]]:
        """Return buckets, each as the names of every owner and the entries of the largest of these parts."""
        replicas = self.dp_group.size()
        sizes = {name: self.parameters[name].numel() for name in names}
        result = []
        for bucket in buckets(names, self.owners, sizes, BUCKET_ELEMENTS // replicas):
            parts = [[name for name in bucket if self.owners[name] == owner] for owner in range(replicas)]
            result.append((parts, max(sum(sizes[name] for name in part) for part in parts)))
        return result

    def _gradient(self, name: str) -> Tensor:
        """Return a gathered gradient, or nothing of one that was sent to its owner."""
        if name in self._reduced and not self._owns(name):
            return torch.zeros(0, device=self.parameters[name].device)
        return self.gathered(name)

    @torch.no_grad()
    def update(self, names: Sequence[str], scales: Mapping[str, Tensor | float], rates: Mapping[str, float]) -> None:
        """Update the matrices that are due and belong here, and hand all weights that are due to all replicas."""
        here = [name for name in names if self._owns(name)]
        gradients = {name: self.gathered(name) * scales[name] for name in here}
        slices = {name: gradients.pop(name) for name in here if name in self._gathered}
        gradients |= self._gather_slices(slices)
        for name, gradient in gradients.items():
            self._masters[name].grad = gradient
        for rule in self.rules.values():
            for group in rule.param_groups:
                group["lr"] = rates[group["name"]]
            rule.step()
        for name in here:
            self.accumulators[name].clear()
        for name in gradients:
            self._masters[name].grad = None
            if name not in self._gathered and self._masters[name] is not self.parameters[name]:
                self.parameters[name].copy_(self._masters[name])
        self._scatter_slices(list(slices))
        self._share_weights(names)
        self._reduced = set()

    def _share_weights(self, names: Sequence[str]) -> None:
        """Copy updated weights from their owners to all replicas."""
        if self.dp_group.size() == 1:
            return
        for alike in self._by_dtype(names):
            for parts, room in self._buckets(alike):
                own = self._like(alike).new_zeros(room)
                _pack([self.parameters[name].detach() for name in parts[self.dp_group.rank()]], own)
                flat = own.new_empty(room * self.dp_group.size())
                dist.all_gather_into_tensor(flat, own, group=self.dp_group)
                for owner, (part, packed) in enumerate(zip(parts, flat.split(room), strict=True)):
                    if owner != self.dp_group.rank():
                        weights = [self.parameters[name].detach() for name in part]
                        for weight, new in zip(weights, _unpacked(packed, weights), strict=True):
                            weight.copy_(new)

    def _like(self, names: Sequence[str]) -> Tensor:
        return self.parameters[names[0]].detach()

    def _by_dtype(self, names: Iterable[str]) -> list[list[str]]:
        alike: dict[torch.dtype, list[str]] = defaultdict(list)
        for name in names:
            alike[self.parameters[name].dtype].append(name)
        return list(alike.values())

    def _of_tp_owners(self, names: Iterable[str]) -> list[list[str]]:
        names = list(names)
        return [[name for name in names if self.tp_owners[name] == rank] for rank in range(self.tp_group.size())]

    def _gather_slices(self, slices: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the wholes of which every tensor-parallel rank has a slice, those that belong here."""
        if not slices:
            return {}
        owners, ranks = self._of_tp_owners(slices), self.tp_group.size()
        mine = owners[self.tp_group.rank()]
        counts = [sum(slices[name].numel() for name in names) for names in owners]
        size = counts[self.tp_group.rank()]
        send = torch.cat([slices[name].flatten() for names in owners for name in names])
        received = send.new_empty(ranks * size)
        dist.all_to_all_single(received, send, [size] * ranks, counts, group=self.tp_group)
        parts = [_unpacked(packed, [slices[name] for name in mine]) for packed in received.view(ranks, size)]
        return {name: torch.cat(pieces, self._split[name]) for name, *pieces in zip(mine, *parts, strict=True)}

    def _scatter_slices(self, names: Sequence[str]) -> None:
        """Give every tensor-parallel rank its slice of masters that have been updated."""
        for alike in self._by_dtype(names):
            owners, ranks = self._of_tp_owners(alike), self.tp_group.size()
            like = self._like(alike)
            pieces = {
                name: self._masters[name].detach().to(like.dtype).chunk(ranks, self._split[name])
                for name in owners[self.tp_group.rank()]
            }
            send = [piece[rank].flatten() for rank in range(ranks) for piece in pieces.values()]
            counts = [sum(self.parameters[name].numel() for name in of_owner) for of_owner in owners]
            received = like.new_empty(sum(counts))
            size = counts[self.tp_group.rank()]
            flat = torch.cat(send) if send else like.new_empty(0)
            dist.all_to_all_single(received, flat, counts, [size] * ranks, group=self.tp_group)
            weights = [self.parameters[name].detach() for of_owner in owners for name in of_owner]
            for weight, new in zip(weights, _unpacked(received, weights), strict=True):
                weight.copy_(new)

    def masters(self, names: Sequence[str]) -> list[Tensor]:
        """Return the float32 masters that are here, whole; nothing of the others."""
        nothing = torch.zeros(0, device=next(iter(self.parameters.values())).device)
        return [self._masters[name].detach() if name in self._masters else nothing for name in names]

    def state_dict(self) -> dict[str, Tensor]:
        """Return masters of low-precision parameters and the rules' state, of what belongs here."""
        result = {}
        for name, master in self._masters.items():
            if self.parameters[name].dtype != torch.float32:
                result[f"{name}.master"] = master.detach()
            result |= {f"{name}.{key}": value for key, value in self._rule_of[name].state[master].items()}
        return result

    def _set_masters(self, names: Iterable[str]) -> None:
        """Set masters to weights. All tensor-parallel ranks call."""
        names = set(names)
        for name in self._masters.keys() & names - self._gathered:
            self._masters[name].copy_(self.parameters[name])
        self._gather_masters(name for name in self.tp_owners if name in names)


def _cuts_matrices(parameter: nn.Parameter) -> bool:
    """Tell whether a tensor-parallel rank holds parts of matrices, rather than some whole ones."""
    split = parameter.spec.partition_dim
    return split is not None and split >= parameter.dim() - 2


def _pack(tensors: Sequence[Tensor], flat: Tensor) -> None:
    """Write tensors end to end to the beginning of `flat`."""
    for place, tensor in zip(_unpacked(flat, tensors), tensors, strict=True):
        place.copy_(tensor)


def _unpacked(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors at the beginning of `flat`, in the shapes of `like`."""
    sizes = [tensor.numel() for tensor in like]
    parts = flat[: sum(sizes)].split(sizes) if sizes else ()
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
