"""Associative memories that share keys and gates: what they answer, what they write, how a chunk moves them.

Shapes here put heads before tokens: `[B, H, C, .]`, with `N` memories `[B, H, N, C, .]`. Wide memories answer with
vectors of the head dim `D`, narrow ones with one number (gates).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hopescale.ops.activation import times_silu_slope
from hopescale.ops.delta_rule import ChunkTables, Read, predict, read_chunk, write_chunk
from hopescale.parallel.layers import ParameterSpec, new_parameter

INITIAL_OUTPUT_STD = 0.1
KEY_EPS = 1e-2
"""Added to the squared length of a hidden activation before it is divided by its length: a memory that has been erased
answers with almost nothing, and its direction must not turn into a large gradient."""


@dataclass(frozen=True)
class InnerRule:
    """How memories learn inside the sequence; the fields are those of `SelfModifyingConfig`."""

    targets: Literal["self", "value"]
    objective: Literal["l2", "dot"]
    erase: bool
    error_cap: float | None


class Weights(NamedTuple):
    """Weights (or momenta) of the memories of a bank, one set per sequence.

    Attributes:
        first: `[B, H, R, D]`, the matrices that read keys, stacked: wide memories, then narrow ones.
        wide: Second layers of wide MLP memories `[B, H, Nw, D, E]`; None for linear memories.
        narrow: Second layers of narrow MLP memories `[B, H, Nn, 1, E]`; None if there are none.
    """

    first: Tensor
    wide: Tensor | None
    narrow: Tensor | None

    def zeros_like(self) -> Weights:
        """Return zeros of the same shapes."""
        return Weights(*(None if part is None else torch.zeros_like(part) for part in self))


class BankState(NamedTuple):
    """Weights after the last token, their momentum, and the weights at the start of the current chunk."""

    running: Weights
    momentum: Weights | None
    boundary: Weights

    def at_boundary(self) -> BankState:
        """Begin a chunk: gradients are taken at the present weights from now on."""
        return self._replace(boundary=self.running)


class Writes(NamedTuple):
    """Keys and write values of one chunk (DGD layer by layer; Nested Learning, section 4.5 and Eq. 93).

    Attributes:
        key: Key of the first layers `[B, H, C, D]`.
        first: Write values of the first layers `[B, H, C, R]`.
        wide: Keys of unit length or less `[B, H, Nw, C, E]` and values `[B, H, Nw, C, D]` of wide second layers; None
            for linear memories.
        narrow: The same for narrow ones, values `[B, H, Nn, C, 1]`; None if there are none.
        surprise: Norm of each token's error in each wide memory `[B, H, Nw, C]`.
    """

    key: Tensor
    first: Tensor
    wide: tuple[Tensor, Tensor] | None
    narrow: tuple[Tensor, Tensor] | None
    surprise: Tensor


class InitialMemory(nn.Module):
    """Learned initial state of one memory, one per head: `w` if linear, `w2` then `w1` if an MLP."""

    def __init__(self, num_heads: int, size_in: int, size_out: int, hidden: int | None):
        super().__init__()
        shared = {"partition_dim": 0, "keep_fp32": True}
        output_std = INITIAL_OUTPUT_STD / (hidden or size_in) ** 0.5
        if hidden is None:
            spec = ParameterSpec(std=output_std, identity=size_out == size_in, **shared)
            self.w = new_parameter(num_heads, size_out, size_in, spec=spec)
        else:
            self.w2 = new_parameter(num_heads, hidden, size_in, spec=ParameterSpec(std=2 * hidden**-0.5, **shared))
            self.w1 = new_parameter(num_heads, size_out, hidden, spec=ParameterSpec(std=output_std, **shared))


class MemoryBank(nn.Module):
    """Memories of one mixer that are written at the same boundaries.

    Args:
        wide: Names of the memories that answer with vectors; the one called `mem` comes first.
        narrow: Names of those that answer with one number.
        num_heads: Heads of this rank.
        head_dim: `D`.
        hidden: `E` of an MLP memory; None makes memories linear.
        rule: How they learn.
    """

    def __init__(
        self,
        wide: tuple[str, ...],
        narrow: tuple[str, ...],
        *,
        num_heads: int,
        head_dim: int,
        hidden: int | None,
        rule: InnerRule,
    ):
        super().__init__()
        self.wide, self.narrow = wide, narrow
        self.hidden, self.rule = hidden, rule
        self.rows = hidden or head_dim
        for name in wide + narrow:
            self.add_module(name, InitialMemory(num_heads, head_dim, head_dim if name in wide else 1, hidden))

    def initial_state(self, batch: int, momentum: bool) -> BankState:
        """Expand the learned initial weights to `batch` sequences."""

        def stack(names: tuple[str, ...]) -> Tensor | None:
            if not names or self.hidden is None:
                return None
            return self._expand(torch.stack([getattr(self, name).w1 for name in names], dim=1), batch)

        key = "w" if self.hidden is None else "w2"
        first = torch.cat([getattr(getattr(self, name), key) for name in self.wide + self.narrow], dim=1)
        weights = Weights(self._expand(first, batch), stack(self.wide), stack(self.narrow))
        return BankState(weights, weights.zeros_like() if momentum else None, weights)

    @staticmethod
    def _expand(x: Tensor, batch: int) -> Tensor:
        kind = torch.promote_types(x.dtype, torch.float32)
        return x.to(kind).expand(batch, *x.shape)

    def ask(self, weights: Weights, inputs: dict[str, Tensor], gate_input: Tensor) -> dict[str, Tensor]:
        """Ask memories with fixed weights: `M(x)`, each with its own input.

        Args:
            weights: Of all memories of the bank.
            inputs: Input `[B, H, C, D]` of each wide memory that is asked.
            gate_input: Input of all narrow memories `[B, H, C, D]`.

        Returns:
            Answers by name: `[B, H, C, D]` of wide memories, `[B, H, C]` of narrow ones.
        """
        sizes = [self.rows] * len(self.wide) + [weights.first.shape[2] - self.rows * len(self.wide)]
        *first, narrow = weights.first.split(sizes, dim=2)
        second = [None] * len(first) if weights.wide is None else weights.wide.unbind(2)
        answers = {}
        for name, w2, w1 in zip(self.wide, first, second, strict=True):
            if name in inputs:
                pre = inputs[name] @ w2.mT
                answers[name] = pre if w1 is None else inputs[name] + F.silu(pre) @ w1.mT
        if self.narrow:
            logits = (gate_input @ narrow.mT).unflatten(-1, (len(self.narrow), -1))  # [B, H, C, N, .]
            if self.hidden is not None:
                logits = (F.silu(logits) * weights.narrow[:, :, None, :, 0]).sum(-1, keepdim=True)
            answers |= dict(zip(self.narrow, logits[..., 0].unbind(-1), strict=True))
        return answers

    def _split(self, stacked: Tensor) -> tuple[Tensor, Tensor]:
        """Split first-layer results `[B, H, C, R]` into wide and narrow memories `[B, H, N, C, .]`."""
        cut = len(self.wide) * self.rows
        wide, narrow = stacked.split([cut, stacked.shape[-1] - cut], dim=-1)
        narrow_rows = 1 if self.hidden is None else self.rows
        return (
            wide.unflatten(-1, (len(self.wide), self.rows)).transpose(2, 3),
            narrow.unflatten(-1, (len(self.narrow), narrow_rows)).transpose(2, 3),
        )

    def _error(self, answer: Tensor, target: Tensor) -> Tensor:
        """Gradient of the inner loss with respect to the answers."""
        if self.rule.objective == "dot":
            return -target
        error = answer - target
        if self.rule.error_cap is None:
            return error
        scale = self.rule.error_cap * torch.rsqrt(error.square().sum(-1, keepdim=True) + 1e-12)
        return error * scale.clamp_max(1.0)

    def writes(self, boundary: Weights, k: Tensor, v: Tensor, mu: Tensor | None) -> Writes:
        """Compute what every memory writes for keys `k` and values `v`, `[B, H, C, D]`, at the boundary weights.

        With momentum `mu` `[B, H, C]` a write enters by `1 - mu` of its size, so that all it pushes adds up to one
        write. Gradients of a chunk are taken at its boundary: were they amplified by `1 / (1 - mu)`, a key that comes
        back in every chunk would overshoot its target further each time.
        """
        fresh = None if mu is None else (1 - mu)[:, :, None, :, None]
        asked = torch.cat([k, v], dim=2) if self.rule.targets == "self" else k
        wide, narrow = self._split(asked @ boundary.first.mT)
        first, wide_pair, error = self._errors(wide, boundary.wide, asked[:, :, None], v, fresh)
        narrow_pair = None
        if self.narrow:
            of_narrow, narrow_pair, _ = self._errors(narrow, boundary.narrow, 0.0, v, fresh)
            first = torch.cat([part.transpose(2, 3).flatten(3) for part in (first, of_narrow)], dim=-1)
        else:
            first = first.transpose(2, 3).flatten(3)
        return Writes(k, first, wide_pair, narrow_pair, error.detach().norm(dim=-1))

    def _errors(
        self, pre: Tensor, w1: Tensor | None, residual: Tensor | float, v: Tensor, fresh: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Tensor]:
        """Compute the write values of wide or of narrow memories from their first-layer results.

        Args:
            pre: First-layer results for keys, and for values after them if targets are the memories' own.
            w1: Second layers; None for linear memories.
            residual: What an MLP adds to its second layer.
            v: The targets if they are not the memories' own.
            fresh: Factor on every write; None is 1.

        Returns:
            Write values of the first layers `[B, H, N, C, E]`, keys and write values of the second, and the errors.
        """
        tokens = v.shape[2]
        hidden = pre if w1 is None else F.silu(pre)
        answers = pre if w1 is None else residual + hidden @ w1.mT
        target = v[:, :, None]
        if self.rule.targets == "self":
            answers, target = answers.split(tokens, dim=3)
            pre, hidden = pre.split(tokens, dim=3)[0], hidden.split(tokens, dim=3)[0]
        error = self._error(answers, target)
        push = error if fresh is None else error * fresh
        if w1 is None:
            return -push, None, error
        norm = torch.sqrt(hidden.square().sum(-1, keepdim=True) + KEY_EPS)
        delta = times_silu_slope(push @ w1, pre)
        return -delta, (hidden / norm, -norm * push), error

    def advance(
        self, state: BankState, writes: Writes, tables: ChunkTables, q: Tensor | None, read: Read
    ) -> tuple[Tensor | None, BankState]:
        """Move all memories over one chunk, and read the first wide one with `q` `[B, H, C, D]` on the way.

        Returns:
            The answers to `q`, `[B, H, C, D]` (None without `q`), and the state after the chunk.
        """
        momentum = state.momentum or Weights(None, None, None)
        per_memory = tables.map(lambda table: table.unsqueeze(2))
        pairs = ((writes.key, writes.first), writes.wide, writes.narrow)
        layers = [
            None if pair is None else _Layer.solve(table, *pair, weight, push, self.rule.erase)
            for table, pair, weight, push in zip(
                (tables, per_memory, per_memory), pairs, state.running, momentum, strict=True
            )
        ]
        after = [(None, None) if layer is None else layer.after() for layer in layers]
        running, pushed = (Weights(*parts) for parts in zip(*after, strict=True))
        output = None if q is None else self._read(state.boundary, layers, q, read)
        return output, BankState(running, pushed if state.momentum else None, state.boundary)

    def _read(self, boundary: Weights, layers: list[_Layer | None], q: Tensor, read: Read) -> Tensor:
        """Read the first wide memory. Two reads in a row make an MLP's."""
        if read == "boundary":
            return self.ask(boundary, {self.wide[0]: q}, q)[self.wide[0]]
        first, second, _ = layers
        inner = first.rows(self.rows).read(q, read)
        return inner if second is None else q + second.memory(0).read(F.silu(inner), read)


class _Layer(NamedTuple):
    """One linear layer during one chunk: what it is written with and what it held."""

    tables: ChunkTables
    keys: Tensor
    values: Tensor
    weight: Tensor
    momentum: Tensor | None
    held: Tensor | None

    @classmethod
    def solve(
        cls, tables: ChunkTables, keys: Tensor, values: Tensor, weight: Tensor, momentum: Tensor | None, erase: bool
    ) -> _Layer:
        held = predict(tables, keys, values, weight, momentum) if erase else None
        return cls(tables, keys, values, weight, momentum, held)

    def after(self) -> tuple[Tensor, Tensor | None]:
        return write_chunk(self.tables, self.keys, self.values, self.held, self.weight, self.momentum)

    def read(self, q: Tensor, read: Read) -> Tensor:
        return read_chunk(self.tables, self.keys, q, self.values, self.held, self.weight, self.momentum, read)

    def rows(self, stop: int) -> _Layer:
        """Keep the first `stop` outputs of a stacked layer."""
        held = None if self.held is None else self.held[..., :stop]
        momentum = None if self.momentum is None else self.momentum[..., :stop, :]
        return self._replace(
            values=self.values[..., :stop], weight=self.weight[..., :stop, :], held=held, momentum=momentum
        )

    def memory(self, index: int) -> _Layer:
        """Keep one of the memories of `[B, H, N, ...]`; tables are shared along that dimension."""
        tables = self.tables.map(lambda table: table[:, :, 0])
        return _Layer(tables, *(None if part is None else part[:, :, index] for part in self[1:]))
