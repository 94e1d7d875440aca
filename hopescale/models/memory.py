"""The learned initial states of memories; `ops/self_modifying` runs them."""

from __future__ import annotations

from torch import Tensor, nn

from hopescale.ops.self_modifying import MemorySpec, MemoryStart, MemoryState
from hopescale.parallel.layers import ParameterSpec, new_parameter

INITIAL_OUTPUT_STD = 0.1


class InitialMemory(nn.Module):
    """Learned initial state of one memory, one per head: `w` if linear, `w2` then `w1` if an MLP."""

    def __init__(self, num_heads: int, size_in: int, size_out: int, hidden: int | None):
        super().__init__()
        shared = {"partition_dim": 0, "keep_fp32": True}
        output_std, rows = INITIAL_OUTPUT_STD / (hidden or size_in) ** 0.5, "one" if size_out == 1 else "head"
        if hidden is None:
            spec = ParameterSpec(std=output_std, identity=size_out == size_in, sizes=(rows, "head"), **shared)
            self.w = new_parameter(num_heads, size_out, size_in, spec=spec)
        else:
            first = ParameterSpec(std=2 * hidden**-0.5, sizes=("memory", "head"), **shared)
            second = ParameterSpec(std=output_std, sizes=(rows, "memory"), **shared)
            self.w2 = new_parameter(num_heads, hidden, size_in, spec=first)
            self.w1 = new_parameter(num_heads, size_out, hidden, spec=second)


class MemoryBank(nn.Module):
    """Learned initial states of the memories of one bank.

    Args:
        spec: Memories of the bank.
        num_heads: Heads of this rank.
        head_dim: Width of a head, `D`.
    """

    def __init__(self, spec: MemorySpec, num_heads: int, head_dim: int):
        super().__init__()
        self.spec = spec
        for names, size_out in ((spec.vector_memories, head_dim), (spec.gate_memories, 1)):
            for name in names:
                self.add_module(name, InitialMemory(num_heads, head_dim, size_out, spec.hidden))

    def start(self, momentum: bool) -> MemoryStart:
        """Return the learned initial weights, with momentum or without."""
        (vectors, gates), linear = (self.spec.vector_memories, self.spec.gate_memories), self.spec.hidden is None

        def layers(names: tuple[str, ...], layer: str) -> tuple[Tensor, ...]:
            return tuple(getattr(getattr(self, name), layer) for name in names)

        if linear:
            return MemoryStart(layers(vectors + gates, "w"), (), (), momentum)
        return MemoryStart(layers(vectors + gates, "w2"), layers(vectors, "w1"), layers(gates, "w1"), momentum)

    def initial_state(self, batch: int, momentum: bool) -> MemoryState:
        """Expand the learned initial weights to `batch` sequences."""
        return self.start(momentum).expand(batch)
