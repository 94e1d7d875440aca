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

from hopescale.ops.delta_rule import ChunkTables, Read, predict, read_chunk, write_chunk
from hopescale.parallel.layers import ParameterSpec, new_parameter

INITIAL_OUTPUT_STD = 0.1


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
    """Keys and write values of one chunk (`hope.md` section 2; DGD layer by layer, NL section 4.5).

    Attributes:
        key: Key of the first layers `[B, H, C, D]`.
        first: Write values of the first layers `[B, H, C, R]`.
        wide: Unit keys `[B, H, Nw, C, E]` and values `[B, H, Nw, C, D]` of wide second layers; None if linear.
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
        self.head_dim, self.hidden, self.rule = head_dim, hidden, rule
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
        answers = {}
        for name, x in inputs.items():
            index = self.wide.index(name)
            pre = x @ weights.first[:, :, index * self.rows : (index + 1) * self.rows].mT
            answers[name] = pre if self.hidden is None else x + F.silu(pre) @ weights.wide[:, :, index].mT
        if self.narrow:
            pre = (gate_input @ weights.first[:, :, len(self.wide) * self.rows :].mT).unflatten(
                -1, (len(self.narrow), -1)
            )
            if self.hidden is not None:
                pre = (F.silu(pre) * weights.narrow[:, :, None, :, 0]).sum(-1, keepdim=True)
            answers |= {name: pre[:, :, :, i, 0] for i, name in enumerate(self.narrow)}
        return answers

    def _answers(self, weights: Weights, z: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Ask all memories with the same `z` `[B, H, C, D]`.

        Returns:
            First-layer results `[B, H, N, C, E]` and answers `[B, H, N, C, .]`, each of wide and of narrow memories.
        """
        stacked, cut = z @ weights.first.mT, len(self.wide) * self.rows
        narrow_rows = 1 if self.hidden is None else self.rows
        pre = (
            stacked[..., :cut].unflatten(-1, (len(self.wide), self.rows)).transpose(2, 3),
            stacked[..., cut:].unflatten(-1, (len(self.narrow), narrow_rows)).transpose(2, 3),
        )
        if self.hidden is None:
            return pre, pre
        wide = z[:, :, None] + F.silu(pre[0]) @ weights.wide.mT if self.wide else pre[0]
        narrow = F.silu(pre[1]) @ weights.narrow.mT if self.narrow else pre[1][..., :1]
        return pre, (wide, narrow)

    @staticmethod
    def _join(wide: Tensor, narrow: Tensor) -> Tensor:
        """Stack first-layer values of wide and narrow memories again: `[B, H, C, R]`."""
        return torch.cat([part.transpose(2, 3).flatten(3) for part in (wide, narrow)], dim=-1)

    def _errors(self, answers: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Gradient of the inner loss with respect to the answers, wide and narrow."""
        if self.rule.objective == "dot":
            return [-target for target in targets]
        errors = [answer - target for answer, target in zip(answers, targets, strict=True)]
        if self.rule.error_cap is not None:
            cap = self.rule.error_cap
            errors = [e * (cap * torch.rsqrt(e.square().sum(-1, keepdim=True) + 1e-12)).clamp_max(1.0) for e in errors]
        return errors

    def writes(self, boundary: Weights, k: Tensor, v: Tensor) -> Writes:
        """Compute what every memory writes for keys `k` and values `v`, `[B, H, C, D]`, at the boundary weights."""
        tokens = k.shape[2]
        if self.rule.targets == "self":
            pre, answers = self._answers(boundary, torch.cat([k, v], dim=2))
            targets = [part[:, :, :, tokens:] for part in answers]
            answers, pre = ([part[:, :, :, :tokens] for part in parts] for parts in (answers, pre))
        else:
            pre, answers = self._answers(boundary, k)
            targets = [v[:, :, None].expand_as(answers[0]), torch.zeros_like(answers[1])]
        errors = self._errors(answers, targets)
        surprise = errors[0].detach().norm(dim=-1)
        if self.hidden is None:
            return Writes(k, self._join(*(-e for e in errors)), None, None, surprise)

        second = [boundary.wide, boundary.narrow]
        deltas, pairs = [], []
        for a, e, w1 in zip(pre, errors, second, strict=True):
            if w1 is None:
                deltas.append(torch.zeros_like(a))
                pairs.append(None)
                continue
            gate = torch.sigmoid(a)
            deltas.append((e @ w1) * (gate * (1 + a * (1 - gate))))
            s = a * gate
            norm = torch.sqrt(s.square().sum(-1, keepdim=True) + 1e-12)
            pairs.append((s / norm, -norm * e))
        return Writes(k, self._join(*(-d for d in deltas)), pairs[0], pairs[1], surprise)

    def advance(
        self, state: BankState, writes: Writes, tables: ChunkTables, q: Tensor | None, read: Read
    ) -> tuple[Tensor | None, BankState]:
        """Move all memories over one chunk, and read the first wide one with `q` `[B, H, C, D]` on the way.

        Returns:
            The answers to `q`, `[B, H, C, D]` (None without `q`), and the state after the chunk.
        """
        momentum = state.momentum or Weights(None, None, None)
        per_memory = tables.unsqueeze(2)
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
        tables = ChunkTables(*(None if table is None else table[:, :, 0] for table in self.tables))
        return _Layer(tables, *(None if part is None else part[:, :, index] for part in self[1:]))
