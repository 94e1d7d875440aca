"""Sums of gradients that replicas add up: taken out of an accumulator, in fewer bits if wanted, and waited for later.

What the wire's type cannot hold of a sum stays in the accumulator, and goes out with the next one: error feedback, as
in arXiv 1809.07599, whose memory is here the accumulator of a slow level that there is anyway.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hopescale.cost.updates import WIRE_BLOCK, Wire

_LARGEST = {"int8": 127, "int4": 7}
_TINY = torch.finfo(torch.float32).tiny


def encode(sums: Tensor, wire: Wire) -> Tensor:
    """Round float32 sums `[n, part]` to the wire's type: `[n, part]` bfloat16, or bytes `[n, b]`.

    Integers have a float32 scale for every `WIRE_BLOCK` entries of a row, the largest of which becomes 127 or 7. A
    block with an entry that is not finite becomes nan.
    """
    if wire == "bf16":
        return sums.bfloat16()
    blocks = torch.nn.functional.pad(sums, (0, -sums.shape[1] % WIRE_BLOCK)).view(len(sums), -1, WIRE_BLOCK)
    scales = (blocks.abs().amax(-1, keepdim=True) / _LARGEST[wire]).clamp_min(_TINY)
    codes = (blocks / scales).round_().nan_to_num_(0.0).to(torch.int8).flatten(1)
    if wire == "int4":
        codes = (codes[:, ::2] + 8) * 16 + codes[:, 1::2] + 8
    return torch.cat([codes.to(torch.int8).view(torch.uint8), scales.flatten(1).view(torch.uint8)], 1)


def decode(coded: Tensor, part: int, wire: Wire) -> Tensor:
    """Return the float32 numbers `[n, part]` that `encode` rounded sums to."""
    if wire == "bf16":
        return coded.float()
    count = -(-part // WIRE_BLOCK)
    codes, scales = coded.split([coded.shape[1] - 4 * count, 4 * count], 1)
    if wire == "int4":
        codes = torch.stack([codes >> 4, codes & 15], -1).to(torch.int8) - 8
    numbers = codes.contiguous().view(torch.int8).view(len(coded), count, WIRE_BLOCK).float()
    scales = scales.contiguous().view(torch.float32)[..., None]
    return (numbers * scales).flatten(1)[:, :part]


class SentSum:
    """Sums that are on their way between replicas, which add them up in float32.

    Args:
        sums: `[n * part]` float32, a part for each of the `n` replicas. What is sent is taken out: nothing is left but
            what the wire's type cannot hold.
        group: Replicas.
        wire: Type in which sums travel.
        whole: Whether every replica gets the whole total, and not its part; it comes back in float32.
    """

    def __init__(self, sums: Tensor, group: dist.ProcessGroup, wire: Wire = "fp32", *, whole: bool = False):
        self._group, self._wire, self._whole, self._work = group, wire, whole, None
        self._total: Tensor | None = None
        self._part = sums.numel() // group.size()
        self._sent = self._received = sums.clone() if wire == "fp32" else encode(sums.view(group.size(), -1), wire)
        if wire == "fp32":
            sums.zero_()
        else:
            sums.sub_(decode(self._sent, self._part, wire).reshape(-1))
        if group.size() > 1:
            self._begin()

    def _begin(self) -> None:
        if self._wire != "fp32":
            self._received = torch.empty_like(self._sent)
            self._work = dist.all_to_all_single(self._received, self._sent, group=self._group, async_op=True)
        elif self._whole:
            self._work = dist.all_reduce(self._sent, group=self._group, async_op=True)
        else:
            self._received = self._sent.narrow(0, self._group.rank() * self._part, self._part)
            self._work = dist.reduce_scatter_tensor(self._received, self._sent, group=self._group, async_op=True)

    def finish(self) -> Tensor:
        """Wait, and return the total, once: this replica's part `[part]`, or all of it. All replicas call."""
        own = self._arrived()
        if not self._whole or self._wire == "fp32" or self._group.size() == 1:
            return own
        whole = own.new_empty(self._part * self._group.size())
        dist.all_gather_into_tensor(whole, own, group=self._group)
        return whole

    def share(self) -> Tensor:
        """Wait, and return what adds up over replicas to the total, `[n * part]`: of equal copies one."""
        own, rank = self._arrived(), self._group.rank()
        if len(own) > self._part:
            return own.clone() if rank == 0 else torch.zeros_like(own)
        result = own.new_zeros(self._part * self._group.size())
        result.narrow(0, rank * self._part, self._part).copy_(own)
        return result

    def _arrived(self) -> Tensor:
        """Wait, and return the sum of what this replica has received."""
        if self._total is None:
            if self._work is not None:
                self._work.wait()
            self._total = self._received if self._wire == "fp32" else self._added_up()
            self._work = self._sent = self._received = None
        return self._total

    def _added_up(self) -> Tensor:
        total, *others = decode(self._received, self._part, self._wire).unbind()
        total = total.clone()
        for other in others:
            total.add_(other)
        return total
