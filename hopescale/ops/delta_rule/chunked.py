"""The closed form of a chunk: matrix products and triangular solves. README.md derives it.

The parts (`decay_weights`, `open_chunk`, `read_chunk`, `write_chunk`) work on `[..., C, .]` with heads before tokens
and broadcast over leading dimensions, so that memories which share keys and gates share the tables and the solve. They
take states and momenta transposed, `[..., D, Do]`: products with small matrices from the left are the fast ones.
"""

from __future__ import annotations

from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor

from hopescale.ops.delta_rule.decay import DecayWeights, decay_weights
from hopescale.ops.delta_rule.types import DeltaRuleOutput, Read, check_arguments


class Chunk(NamedTuple):
    """One chunk of a linear memory, before its writes are known.

    Attributes:
        decay: Weights of this chunk, broadcastable to the leading dimensions.
        k: Keys `[..., C, D]`.
        system: `before.erase * K K^T` `[..., C, C]`, by how much a key erases what an earlier one wrote; None if writes
            do not erase.
        written: `before.write * K K^T`; `system` itself without momentum.
        erased: Loss of the last state for each value that a key reads `[..., C, D]`; None if writes do not erase.
    """

    decay: DecayWeights
    k: Tensor
    system: Tensor | None
    written: Tensor | None
    erased: Tensor | None


class Values(NamedTuple):
    """Writes of one chunk.

    Attributes:
        written: Write values `[..., C, Do]`. Without momentum, what the keys read of the first state is taken off
            where writes erase: then they are all that enters.
        read: Answer to each key had nothing of the chunk been erased `[..., C, Do]`; None without momentum or erase.
    """

    written: Tensor
    read: Tensor | None


def open_chunk(decay: DecayWeights, k: Tensor, *, erase: bool) -> Chunk:
    """Solve for the spread of the erases of keys `k` `[..., C, D]` over the chunk."""
    if not erase:
        return Chunk(decay, k, None, None, None)
    before, last = decay.before, decay.after.erase[..., -1, :, None]
    similar = k @ k.mT  # [..., C, C]
    system = before.erase * similar
    written = system if before.push is None else before.write * similar
    erased = torch.linalg.solve_triangular(system.mT, last * k, upper=True, unitriangular=True)
    return Chunk(decay, k, system, written, erased)


def _initial_reads(weighting: DecayWeights, x: Tensor, state: Tensor, momentum: Tensor | None) -> Tensor:
    """Read the chunk's first state and momentum `[..., D, Do]` with `x` `[..., C, D]`: `[..., C, Do]`."""
    read = weighting.start[..., None] * (x @ state)
    return read if momentum is None else torch.addcmul(read, weighting.push[..., None], x @ momentum)


def chunk_values(chunk: Chunk, u: Tensor, state: Tensor, momentum: Tensor | None) -> Values:
    """Put write values `u` `[..., C, Do]` in the form in which they are read and written.

    Args:
        chunk: Keys and weights.
        u: Write values.
        state: Memory at the chunk's first token, transposed `[..., D, Do]`.
        momentum: Likewise; None without momentum.
    """
    if chunk.erased is None:
        return Values(u, None)
    read = _initial_reads(chunk.decay.before, chunk.k, state, momentum)
    return Values(u - read, None) if momentum is None else Values(u, read + chunk.written @ u)


def read_chunk(chunk: Chunk, q: Tensor, values: Values, state: Tensor, momentum: Tensor | None, read: Read) -> Tensor:
    """Read the memory with one query per token, `q` like the keys; state and momentum as in `chunk_values`.

    Args:
        read: `prefix` (state before the token's write) or `inclusive` (after it).

    Returns:
        Read values `[..., C, Do]`.
    """
    weighting = chunk.decay.before if read == "prefix" else chunk.decay.after
    similar = q @ chunk.k.mT
    output = _initial_reads(weighting, q, state, momentum)
    if chunk.erased is None:
        return output + (weighting.write * similar) @ values.written
    erased = torch.linalg.solve_triangular(
        chunk.system, weighting.erase * similar, upper=False, left=False, unitriangular=True
    )
    if momentum is None:
        return output + erased @ values.written
    return output + (weighting.write * similar) @ values.written - erased @ values.read


class ChunkUpdate(NamedTuple):
    """Writes that enter a state in a chunk. All but the first three are None without momentum.

    Attributes:
        kept: Weight of the chunk's first state in the last one `[...]`.
        keys: `[..., C, D]`; without momentum their weights are in them.
        values: `[..., C, Do]`.
        weights: Weights of the values in the last state `[..., C]`.
        push: Weight of the first momentum in the last state `[...]`.
        erased: Keys of the erased values `[..., C, D]`; None if writes do not erase.
        read: Values that are erased `[..., C, Do]`; None if writes do not erase.
        last_push: Weights of the values in the last momentum `[..., C]`.
        momentum_decay: Weight of the first momentum in the last one `[...]`.
    """

    kept: Tensor
    keys: Tensor
    values: Tensor
    weights: Tensor | None = None
    push: Tensor | None = None
    erased: Tensor | None = None
    read: Tensor | None = None
    last_push: Tensor | None = None
    momentum_decay: Tensor | None = None

    def add(self, state: Tensor, momentum: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return memory and momentum after the chunk, from those at its first token, as in `chunk_values`."""
        keys = self.keys if self.weights is None else self.weights[..., None] * self.keys
        moved = _plus_product(self.kept[..., None, None] * state, keys.mT, self.values)
        if momentum is None:
            return moved, None
        moved = torch.addcmul(moved, self.push[..., None, None], momentum)
        if self.erased is not None:
            moved = _plus_product(moved, self.erased.mT, self.read, sign=-1)
        return moved, _pushed(momentum, self.keys, self.values, self.last_push, self.momentum_decay)


def write_chunk(chunk: Chunk, values: Values) -> ChunkUpdate:
    """Return the writes that enter the state in a chunk. Arguments as in `read_chunk`."""
    decay, after = chunk.decay, chunk.decay.after
    kept, weights = after.start[..., -1], after.write[..., -1, :]
    if after.push is None:
        return ChunkUpdate(kept, weights[..., None] * chunk.k if chunk.erased is None else chunk.erased, values.written)
    lost = (None, None) if values.read is None else (chunk.erased, values.read)
    push = after.push[..., -1]
    return ChunkUpdate(kept, chunk.k, values.written, weights, push, *lost, decay.last_push, decay.momentum_decay)


def _pushed(momentum: Tensor, keys: Tensor, u: Tensor, last_push: Tensor, momentum_decay: Tensor) -> Tensor:
    return _plus_product(momentum_decay[..., None, None] * momentum, (last_push[..., None] * keys).mT, u)


def _plus_product(x: Tensor, left: Tensor, right: Tensor, sign: int = 1) -> Tensor:
    """Return `x + sign * left @ right`, all with the same leading dimensions, in one pass over `x`."""
    parts = (part.flatten(0, -3) for part in (x, left, right))
    return torch.baddbmm(*parts, alpha=sign).view(x.shape)


class Transition(NamedTuple):
    """How a chunk moves the state: `state @ S_0 + momentum @ Z_0 + values @ U`, with `S_0` and `Z_0` transposed.

    Attributes:
        state: `[..., D, D]`.
        momentum: The same; None without momentum.
        values: `[..., D, C]`.
    """

    state: Tensor
    momentum: Tensor | None
    values: Tensor


def transition(chunk: Chunk) -> Transition:
    """Return the matrices that move states over a chunk: worth their cost if a memory has more outputs than inputs."""
    after, before, k = chunk.decay.after, chunk.decay.before, chunk.k
    identity = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    state = after.start[..., -1, None, None] * identity
    momentum = None if after.push is None else after.push[..., -1, None, None] * identity
    if chunk.erased is None:
        return Transition(state, momentum, (after.write[..., -1, :, None] * k).mT)
    lost = chunk.erased.mT  # [..., D, C]
    state = state - lost @ (before.start[..., None] * k)
    if momentum is None:
        return Transition(state, None, lost)
    momentum = momentum - lost @ (before.push[..., None] * k)
    return Transition(state, momentum, (after.write[..., -1, :, None] * k).mT - lost @ chunk.written)


class Move(NamedTuple):
    """A transition with the writes that it adds. The last three are None without momentum.

    Attributes:
        by: The transition.
        values: Write values `[..., C, Do]`.
        keys: `[..., C, D]`.
        last_push: Weights of the values in the last momentum `[..., C]`.
        momentum_decay: Weight of the first momentum in the last one `[...]`.
    """

    by: Transition
    values: Tensor
    keys: Tensor | None
    last_push: Tensor | None
    momentum_decay: Tensor | None

    def add(self, state: Tensor, momentum: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Add to a state as `ChunkUpdate.add` does."""
        moved = _plus_product(self.by.values @ self.values, self.by.state, state)
        if momentum is None:
            return moved, None
        pushed = _pushed(momentum, self.keys, self.values, self.last_push, self.momentum_decay)
        return _plus_product(moved, self.by.momentum, momentum), pushed


def move_chunk(chunk: Chunk, u: Tensor) -> Move:
    """Return how a chunk in which `u` `[..., C, Do]` is written moves the state, in the form that `transition` is."""
    decay = chunk.decay
    keys = None if decay.push is None else chunk.k
    return Move(transition(chunk), u, keys, decay.last_push, decay.momentum_decay)


def delta_rule(
    k: Tensor,
    u: Tensor,
    eta: Tensor,
    alpha: Tensor,
    state: Tensor,
    *,
    q: Tensor | None = None,
    mu: Tensor | None = None,
    momentum: Tensor | None = None,
    erase: bool = True,
    read: Read = "prefix",
    chunk_size: int = 64,
) -> DeltaRuleOutput:
    """Read and write a linear memory along a sequence.

    Follows `S_t = S_{t-1} (alpha_t I - eta_t k_t k_t^T) + Z_t`, `Z_t = mu_t Z_{t-1} + eta_t u_t k_t^T` (Nested
    Learning, arXiv 2512.24695, Eq. 93 with momentum). Equal to `delta_rule_naive` up to rounding, for any `T >= 0`.
    Everything but the states is computed for all chunks at once; only they are carried from chunk to chunk.

    Args:
        k: Keys `[B, T, H, D]`; unit length keeps the erase bounded.
        u: Write values, minus the inner loss's gradient with respect to the memory's output. `[B, T, H, Do]`.
        eta: Inner learning rate `[B, T, H]`.
        alpha: Retention in `[0, 1]`, `[B, T, H]`.
        state: Memory before the first token `[B, H, Do, D]`, float32 (float64 in tests). Its type is computed in.
        q: Queries like `k`; None if nothing is read.
        mu: Inner momentum in `[0, 1]`, `[B, T, H]`; None for none.
        momentum: `Z` before the first token, like `state`; None is zero. Only with `mu`.
        erase: Whether a write first erases `eta_t k_t k_t^T`; False is plain gradient descent.
        read: State that token t reads: `prefix` is `S_{t-1}`, `inclusive` is `S_t`, `boundary` is the state at the
            start of the token's chunk.
        chunk_size: Tokens per chunk; the last may be shorter. Changes only speed, except for `boundary`.

    Raises:
        ValueError: If shapes disagree, `read` is unknown, `chunk_size < 1`, or `momentum` comes without `mu`.
    """
    check_arguments(k, u, eta, alpha, state, q, mu, momentum, read, chunk_size)
    kind, tokens = state.dtype, k.shape[1]
    out_type = (q if q is not None else k).dtype
    if mu is not None and momentum is None:
        momentum = torch.zeros_like(state)
    state, momentum = state.mT, None if momentum is None else momentum.mT
    whole = tokens - tokens % chunk_size
    outputs = []
    for begin, end, size in ((0, whole, chunk_size), (whole, tokens, tokens - whole)):
        if begin == end:
            continue

        def in_chunks(x: Tensor | None, begin: int = begin, end: int = end, size: int = size) -> Tensor | None:
            return None if x is None else x[:, begin:end].to(kind).transpose(1, 2).unflatten(2, (-1, size))

        inputs = map(in_chunks, (k, u, eta, alpha, mu, q))
        output, state, momentum = _run(*inputs, state, momentum, erase=erase, read=read)
        if q is not None:
            outputs.append(output.flatten(2, 3))
    output = None
    if q is not None:
        output = torch.cat(outputs, dim=2) if outputs else u.new_zeros(u.shape).transpose(1, 2)
        output = output.transpose(1, 2).to(out_type)  # [B, T, H, Do]
    return DeltaRuleOutput(output, state.mT, None if momentum is None else momentum.mT)


def _run(
    k: Tensor,
    u: Tensor,
    eta: Tensor,
    alpha: Tensor,
    mu: Tensor | None,
    q: Tensor | None,
    state: Tensor,
    momentum: Tensor | None,
    *,
    erase: bool,
    read: Read,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Run chunks of one length: inputs `[B, H, N, C, ...]`, memories `[B, H, D, Do]`, outputs `[B, H, N, C, Do]`."""
    chunk = open_chunk(decay_weights(eta, alpha, mu), k, erase=erase)
    by, last_push = transition(chunk), chunk.decay.last_push
    pushed = None if last_push is None else (last_push[..., None] * chunk.k).mT @ u
    parts = (by.values @ u, *by[:2], pushed, chunk.decay.momentum_decay)
    moves = [repeat(None) if x is None else x.unbind(2) for x in parts]
    states, momenta = [], []
    for entering, keep, push, pushed, momentum_decay in zip(*moves, strict=False):
        states.append(state)
        momenta.append(momentum)
        state = _plus_product(entering, keep, state)
        if momentum is not None:
            state = _plus_product(state, push, momentum)
            momentum = torch.addcmul(pushed, momentum_decay[..., None, None], momentum)
    if q is None:
        return None, state, momentum
    first, pushing = torch.stack(states, 2), None if momentum is None else torch.stack(momenta, 2)
    if read == "boundary":
        return q @ first, state, momentum
    return read_chunk(chunk, q, chunk_values(chunk, u, first, pushing), first, pushing, read), state, momentum
