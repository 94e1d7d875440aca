"""Answers and writes of memories, with fixed weights; `advance.py` applies the writes.

Shapes here put heads before tokens: `[B, H, C, .]`, with `N` memories `[B, H, N, C, .]`. Vector memories answer with
vectors of the head dim `D`, gate memories with one number. A `MemorySpec` is that of one bank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hopescale.ops.norm import l2_norm
from hopescale.ops.self_modifying.inner_gradient import capped, mlp_writes
from hopescale.ops.self_modifying.types import MemorySpec, Streams, Weights


def retrieve(spec: MemorySpec, weights: Weights, inputs: dict[str, Tensor], gate_input: Tensor) -> dict[str, Tensor]:
    """Read memories with fixed weights: `M(x)`, each with its own input.

    Args:
        spec: Memories of the bank.
        weights: Weights of all of them.
        inputs: Input `[B, H, C, D]` of each vector memory that is read.
        gate_input: Input of all gate memories `[B, H, C, D]`.

    Returns:
        Answers by name: `[B, H, C, D]` of vector memories, `[B, H, C]` of gate memories.
    """
    answers, rows = {}, spec.hidden or weights.w_in.shape[-2]
    for index, name in enumerate(spec.vector_memories):
        if name in inputs:
            pre = inputs[name] @ weights.w_in[..., index * rows : (index + 1) * rows]
            if spec.hidden is not None:
                pre = inputs[name] + F.silu(pre) @ weights.w_out_vector[:, :, index]
            answers[name] = pre
    if spec.gate_memories:
        logits = gate_input @ weights.w_in[..., len(spec.vector_memories) * rows :]
        logits = logits.unflatten(-1, (len(spec.gate_memories), -1))
        if spec.hidden is not None:
            logits = (F.silu(logits) * weights.w_out_gate[:, :, None, ..., 0]).sum(-1, keepdim=True)
        answers |= dict(zip(spec.gate_memories, logits[..., 0].unbind(-1), strict=True))
    return answers


def make_inputs(spec: MemorySpec, boundary: Weights, streams: Streams) -> Streams:
    """Make keys, values, queries and gates, by memories where they are adaptive (Nested Learning, Eq. 90)."""
    known = {name: stream for name, stream in streams._asdict().items() if stream is not None}
    read = {name: known[name] for name in spec.vector_memories if name in known}
    answers = retrieve(spec, boundary, read, streams.k)
    k, v, q = (l2_norm(answers[name]) if name in answers else known[name] for name in "kvq")
    gates = {
        name: torch.sigmoid(known[name] + answers[name] if name in answers else known[name])
        for name in ("eta", "alpha", "mu")
        if name in known
    }
    eta = spec.eta_max * gates["eta"]
    return Streams(k, v, q, eta, gates.get("alpha", torch.ones_like(eta)), gates.get("mu"))


class Writes(NamedTuple):
    """Keys and write values of one chunk (DGD layer by layer; Nested Learning, section 4.5 and Eq. 93).

    Attributes:
        key: Key of the first layers `[B, H, C, D]`.
        first: Write values of the first layers `[B, H, C, R]`.
        vector: Keys of unit length or less `[B, H, Nv, C, E]` and values `[B, H, Nv, C, D]` of second layers of vector
            memories; None for linear memories.
        gate: The same for gate memories, values `[B, H, Ng, C, 1]`; None if there are none.
        surprise: Norm of each token's error in each vector memory `[B, H, Nv, C]`; None if there are none.
    """

    key: Tensor
    first: Tensor
    vector: tuple[Tensor, Tensor] | None
    gate: tuple[Tensor, Tensor] | None
    surprise: Tensor | None


def write_values(spec: MemorySpec, boundary: Weights, k: Tensor, v: Tensor, mu: Tensor | None) -> Writes:
    """Compute the write values of every memory for keys `k` and values `v`, `[B, H, C, D]`, at the boundary weights.

    With momentum `mu` `[B, H, C]` that averages, a write enters by `1 - mu` of its size, so that all it pushes adds up
    to one write. Gradients of a chunk are taken at its boundary: where they are amplified by `1 / (1 - mu)`, as with
    writes that enter whole, a key that comes back in every chunk may overshoot its target further each time.
    """
    fresh = spec.entering(mu)
    read = torch.cat([k, v], dim=2) if spec.own_target else k
    pre = read @ boundary.w_in
    if spec.hidden is None:
        return _linear_writes(spec, pre, k, v, fresh)
    parts = pre.split([len(names) * spec.hidden for names in (spec.vector_memories, spec.gate_memories)], dim=-1)
    groups = zip(parts, (boundary.w_out_vector, boundary.w_out_gate), ((k, v), None), strict=True)
    groups = [
        None if w_out is None else mlp_writes(part, w_out, residual=residual, fresh=fresh, spec=spec)
        for part, w_out, residual in groups
    ]
    first = [group.first for group in groups if group is not None]
    pairs = (None if group is None else (group.keys, group.values) for group in groups)
    surprise = None if groups[0] is None else groups[0].surprise
    return Writes(k, first[0] if len(first) == 1 else torch.cat(first, dim=-1), *pairs, surprise)


def _linear_writes(spec: MemorySpec, answers: Tensor, k: Tensor, v: Tensor, fresh: Tensor | None) -> Writes:
    """Do the same for linear memories, from their answers to keys and, if these are the targets, to values."""
    tokens, rows, count = *k.shape[2:], len(spec.vector_memories)
    cut = count * rows
    target = answers[..., tokens:, :] if spec.own_target else v.repeat(1, 1, 1, count)
    error = answers[..., :tokens, :] - target if spec.objective == "l2" else -target
    if spec.error_cap is not None:
        vectors = capped(error[..., :cut].unflatten(-1, (count, rows)), spec.error_cap).flatten(-2)
        error = torch.cat([vectors, capped(error[..., cut:, None], spec.error_cap)[..., 0]], dim=-1)
    surprise = None
    if count:
        surprise = error.detach()[..., :cut].unflatten(-1, (-1, rows)).norm(dim=-1).transpose(2, 3)
    return Writes(k, -error if fresh is None else error * -fresh[..., None], None, None, surprise)
