"""The update rule with its whole state on every replica."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hopescale.cost.updates import (
    BUCKET_ELEMENTS,
    BUCKETS_UNDER_WAY,
    EVEN_UNIT,
    Wire,
    buckets,
    sum_elements,
)
from hopescale.optim.adamw import AdamW
from hopescale.optim.cadence import Cadence, begin_periods
from hopescale.optim.gate import StepGate, uncount
from hopescale.optim.updater import Rates, RuleGroup, Scales, Updater, scale_together
from hopescale.optim.wire import SentSum
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
        self._sent: list[tuple[list[str], SentSum]] = []
        self._totals: dict[str, Tensor] = {}
        self._arriving: set[str] = set()
        self._under_way: deque[tuple[list[Tensor], Tensor, dist.Work]] = deque()
        self._begun: set[str] = set()
        self._shares_sequences = mesh.cp_group.size() > 1
        self._room = sum_elements(sum(parameter.numel() for parameter in self.parameters.values()))
        self.rule = AdamW([group.of(self._masters) for group in groups], eps=eps, foreach=True)

    def norm_weight(self, name: str) -> float:
        """Return 1 on one replica and 0 on the others: each holds the whole."""
        return float(self.dp_group.rank() == 0)

    def reduce(self, names: Sequence[str]) -> None:
        """Sum accumulated gradients over replicas, several tensors at a time."""
        self._arriving.update(name for name in names if self.cadences[name].moves)
        self.send([name for name in names if name in self._arriving and not self.cadences[name].lag])
        for bucket in self._buckets(names):
            if bucket[0] not in self._begun:
                self.begin(bucket)
        self._finish(0)
        self._begun.difference_update(names)

    def sums_of(self, names: Sequence[str]) -> list[list[str]]:
        """Return the buckets in which parameters that are due are summed, but for what leaves its accumulator."""
        # A bucket may wait for older ones, and ranks that share sequences wait for each other in a backward pass.
        return [] if self._shares_sequences else self._buckets(names)

    def _buckets(self, names: Sequence[str]) -> list[list[str]]:
        if self.dp_group.size() == 1:
            return []
        sizes = {name: self.parameters[name].numel() for name in names if not self.cadences[name].moves}
        return buckets(sizes, dict.fromkeys(sizes, 0), sizes, self._room)

    def begin(self, names: Sequence[str]) -> None:
        """Begin to sum a bucket, after the oldest of several under way."""
        self._finish(BUCKETS_UNDER_WAY - 1)
        gradients = [self.accumulated_grad(name) for name in names]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self._under_way.append((gradients, flat, dist.all_reduce(flat, group=self.dp_group, async_op=True)))
        self._begun.update(names)

    def _finish(self, most: int) -> None:
        """Wait until at most so many buckets are under way."""
        while len(self._under_way) > most:
            gradients, flat, work = self._under_way.popleft()
            work.wait()
            torch._foreach_copy_(gradients, unpacked(flat, gradients))

    @torch.no_grad()
    def send(self, names: Sequence[str]) -> None:
        """Take the sums of a period that has ended out, and begin to add them up over replicas."""
        sizes = {name: self.parameters[name].numel() for name in names}
        for cadence in dict.fromkeys(self.cadences[name] for name in names):
            together = [name for name in names if self.cadences[name] == cadence]
            for bucket in buckets(together, dict.fromkeys(together, 0), sizes, BUCKET_ELEMENTS):
                self._send([(name, self.accumulated_grad(name)) for name in bucket], cadence.wire)

    def _send(self, sums: Sequence[tuple[str, Tensor]], wire: Wire) -> None:
        names, gradients = zip(*sums, strict=True)
        unit = 1 if wire == "fp32" else EVEN_UNIT * self.dp_group.size()
        count = sum(gradient.numel() for gradient in gradients)
        flat = gradients[0].new_zeros(-(-count // unit) * unit)
        parts = unpacked(flat[:count], gradients)
        torch._foreach_copy_(parts, gradients)
        self._sent.append((list(names), SentSum(flat, self.dp_group, wire, whole=True)))
        torch._foreach_copy_(gradients, parts)

    def _gradient(self, name: str) -> Tensor:
        """Return an accumulated gradient, or the total of one that was sent."""
        return self._total(name) if name in self._arriving else self.accumulated_grad(name)

    def _total(self, name: str) -> Tensor:
        for each in [each for each in self._sent if name in each[0]]:
            self._sent.remove(each)
            self._totals |= self._apart(each[0], each[1].finish())
        return self._totals[name]

    def _apart(self, names: Sequence[str], flat: Tensor) -> dict[str, Tensor]:
        """Return the pieces of a flat tensor, which may be filled up, that belong to parameters."""
        like = [self.parameters[name] for name in names]
        return dict(zip(names, unpacked(flat[: sum(map(Tensor.numel, like))], like), strict=True))

    @torch.no_grad()
    def update(self, names: Sequence[str], scales: Scales, rates: Rates, gate: StepGate | None = None) -> None:
        """Take one step of AdamW with the parameters that are due."""
        for group in self.rule.param_groups:
            group["lr"] = rates[group["name"]]
        gradients = [self._gradient(name) for name in names]
        scale_together(gradients, [scales[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            self._masters[name].grad = gradient
        if gate is not None:
            gate.clear(gradients)
        self.rule.step_through(gate)
        for name in names:
            self._masters[name].grad = None
        self._begin_periods(names)
        low = [name for name in names if self._masters[name] is not self.parameters[name]]
        if low:
            torch._foreach_copy_([self.parameters[name] for name in low], [self._masters[name] for name in low])

    def _begin_periods(self, names: Sequence[str]) -> None:
        """Begin a new period of what was updated; what goes on beside a total that had been sent is left alone."""
        begin_periods(self.accumulators[name] for name in names if name not in self._arriving)
        for name in self._arriving.intersection(names):
            self._arriving.remove(name)
            del self._totals[name]

    def uncount(self, names: Sequence[str]) -> None:
        """Take back that a bad step has counted as an update of parameters."""
        uncount(self.rule, (self._masters[name] for name in names))

    def discard(self) -> None:
        """Drop all gradients, also those that were sent."""
        super().discard()
        self._drop_sent()

    def _drop_sent(self) -> None:
        for _, sent in self._sent:
            sent.share()
        self._sent, self._totals, self._arriving = [], {}, set()

    def _sent_sums(self) -> dict[str, Tensor]:
        """Return what adds up over replicas to the totals that wait for their updates."""
        first = self.dp_group.rank() == 0
        # What had arrived with others, after a checkpoint in which they were on their way together.
        result = {name: total if first else torch.zeros_like(total) for name, total in self._totals.items()}
        for names, sent in self._sent:
            result |= self._apart(names, sent.share())
        return result

    def _send_again(self, totals: Mapping[str, Tensor]) -> None:
        self._drop_sent()
        sizes = {name: total.numel() for name, total in totals.items()}
        for bucket in buckets(totals, dict.fromkeys(totals, 0), sizes, BUCKET_ELEMENTS):
            self._send([(name, totals[name].clone()) for name in bucket], "fp32")

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
