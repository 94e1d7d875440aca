"""The update rule with its whole state on every replica."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hopescale.cost.updates import BUCKET_ELEMENTS, UPDATE_ELEMENTS, buckets
from hopescale.optim.adamw import AdamW
from hopescale.optim.cadence import Cadence
from hopescale.optim.updater import RuleGroup, Updater
from hopescale.parallel.mesh import Mesh


class ReplicatedAdamW(Updater):
    """AdamW, an `Updater` that shards nothing.

    Args:
        groups: Groups that share settings, every parameter in one.
        eps: Term added to the root of the second moment.
        parameters, cadences, mesh: Arguments of `Updater`.
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
        super().__init__(parameters, cadences, mesh)
        self._masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self.parameters.items()
        }
        self.rule = AdamW([group.of(self._masters) for group in groups], eps=eps, foreach=True)

    def norm_weight(self, name: str) -> float:
        """Return 1 on one replica and 0 on the others: each holds the whole."""
        return float(self.dp_group.rank() == 0)

    def reduce(self, names: Sequence[str]) -> None:
        """Sum accumulated gradients over replicas, several tensors at a time."""
        if self.dp_group.size() == 1:
            return
        sizes = {name: self.parameters[name].numel() for name in names}
        for bucket in buckets(names, dict.fromkeys(names, 0), sizes, BUCKET_ELEMENTS):
            gradients = [self.accumulated_grad(name) for name in bucket]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat, group=self.dp_group)
            torch._foreach_copy_(gradients, unpacked(flat, gradients))

    @torch.no_grad()
    def update(self, names: Sequence[str], scales: Mapping[str, Tensor | float], rates: Mapping[str, float]) -> None:
        """Take one step of AdamW with the parameters that are due, some at a time: it computes with copies of them."""
        for group in self.rule.param_groups:
            group["lr"] = rates[group["name"]]
        sizes = {name: self.parameters[name].numel() for name in names}
        for bucket in buckets(names, dict.fromkeys(names, 0), sizes, UPDATE_ELEMENTS):
            self._update(bucket, scales)

    def _update(self, names: Sequence[str], scales: Mapping[str, Tensor | float]) -> None:
        for name in names:
            self._masters[name].grad = self.accumulated_grad(name).mul_(scales[name])
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

    def to_save(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the weights and the state of this replica's share of the parameters."""
        weights, state = super().to_save()
        return weights, {name: tensor for name, tensor in state.items() if name.rpartition(".")[0] in weights}

    def _set_masters(self, names: Iterable[str]) -> None:
        for name in names:
            self._masters[name].copy_(self.parameters[name])


def unpacked(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors that lie end to end in `flat`, in the shapes of `like`."""
    parts = flat.split([tensor.numel() for tensor in like])
    return [part.view(tensor.shape) for part, tensor in zip(parts, like, strict=True)]
