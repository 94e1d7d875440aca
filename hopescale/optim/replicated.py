"""The update rule with its whole state on every replica."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hopescale.optim.cadence import Accumulator, Cadence
from hopescale.optim.updater import RuleGroup
from hopescale.parallel.mesh import Mesh

BUCKET_ELEMENTS = 1 << 24
"""Gradients are summed over replicas in packs of at most this many entries (64 MiB), or one tensor."""


class ReplicatedUpdater:
    """AdamW (torch's, decoupled weight decay, arXiv 1711.05101), an `Updater` that shards nothing.

    Args:
        parameters: Parameters by name; their gradients are taken from them as soon as they are complete.
        groups: Which share settings, every parameter in one.
        eps: Added to the root of the second moment.
        cadences: Of every parameter.
        mesh: Where this process stands.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Sequence[RuleGroup],
        *,
        eps: float,
        cadences: Mapping[str, Cadence],
        mesh: Mesh,
    ):
        self.parameters, self.dp_group = dict(parameters), mesh.dp_group
        self.accumulators = {name: Accumulator(p, cadences[name]) for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.register_post_accumulate_grad_hook(self.accumulators[name].take)
        self._masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }
        self.rule = torch.optim.AdamW([self._torch_group(group) for group in groups], eps=eps, foreach=True)
        for master in self._masters.values():
            # What torch would make at the first step; made now so that a checkpoint always has the same tensors.
            self.rule.state[master] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }

    def _torch_group(self, group: RuleGroup) -> dict:
        members = [self._masters[name] for name in group.members]
        return {"params": members, "weight_decay": group.weight_decay, "betas": group.betas, "name": group.name}

    def share(self, name: str) -> float:
        """Return 1 on one replica and 0 on the others: each holds the whole."""
        return float(self.dp_group.rank() == 0)

    def holds_whole(self, name: str) -> bool:
        """Tell whether state of a parameter is of more than this rank's slice: it never is."""
        return False

    def backward(self, loss: Tensor) -> None:
        """Run the backward pass of a micro batch."""
        loss.backward()

    def gathered(self, name: str) -> Tensor:
        """Return the sum of a parameter's gradients since its last update."""
        return self.accumulators[name].gathered()

    def reduce(self, names: Sequence[str]) -> None:
        """Sum gathered gradients over replicas, several tensors at a time."""
        if self.dp_group.size() == 1:
            return
        for pack in _packs([self.gathered(name) for name in names]):
            flat = torch.cat([tensor.flatten() for tensor in pack])
            dist.all_reduce(flat, group=self.dp_group)
            for tensor, part in zip(pack, flat.split([tensor.numel() for tensor in pack]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def square_norms(self, names: Sequence[str]) -> Tensor:
        """Return the squared norm of each gathered gradient, `[len(names)]`."""
        if not names:
            return torch.zeros(0)
        return torch.stack(torch._foreach_norm([self.gathered(name) for name in names])).square()

    @torch.no_grad()
    def update(self, names: Sequence[str], scales: Mapping[str, Tensor | float], rates: Mapping[str, float]) -> None:
        """Take one step of AdamW with the parameters that are due."""
        for name in names:
            self._masters[name].grad = self.gathered(name) * scales[name]
        for group in self.rule.param_groups:
            group["lr"] = rates[group["name"]]
        self.rule.step()
        for name in names:
            master, parameter = self._masters[name], self.parameters[name]
            master.grad = None
            self.accumulators[name].clear()
            if master is not parameter:
                parameter.copy_(master)

    def masters(self, names: Sequence[str]) -> list[Tensor]:
        """Return the float32 masters."""
        return [self._masters[name].detach() for name in names]

    def state_dict(self) -> dict[str, Tensor]:
        """Return masters of low-precision parameters and AdamW's state; loading may copy into them."""
        result = {}
        for name, master in self._masters.items():
            if master is not self.parameters[name]:
                result[f"{name}.master"] = master.detach()
            result |= {f"{name}.{key}": value for key, value in self.rule.state[master].items()}
        return result

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

    @torch.no_grad()
    def reset_masters(self) -> None:
        """Set masters to the weights."""
        for name, parameter in self.parameters.items():
            self._masters[name].copy_(parameter)

    def sums(self) -> dict[str, Tensor]:
        """Return the running sums of slow parameters."""
        return {name: accumulator.total for name, accumulator in self.accumulators.items() if accumulator.kept}

    @torch.no_grad()
    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Take over running sums, given in parts that add up over replicas; what is missing is zero."""
        for name, total in self.sums().items():
            if name not in sums:
                total.zero_()
            elif sums[name] is not total:
                total.copy_(sums[name])


def _packs(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Group tensors in order so that each group has at most `BUCKET_ELEMENTS` entries, or one tensor."""
    packs: list[list[Tensor]] = []
    room = 0
    for tensor in tensors:
        if not packs or tensor.numel() > room:
            packs.append([])
            room = BUCKET_ELEMENTS
        packs[-1].append(tensor)
        room -= tensor.numel()
    return packs
