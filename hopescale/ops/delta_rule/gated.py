"""The delta rule of a decayed memory, a chunk at a time: linear attention, RetNet, DeltaNet, Gated DeltaNet, Mamba-2.

README.md derives it, under "Decay before the erase". A memory is `[D, Do]`. Heads of one group share keys and queries,
and with them what keys and queries have in common.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hopescale.ops.delta_rule.decay import products_to_tokens
from hopescale.ops.delta_rule.types import check_gated_arguments


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    eta: Tensor | None,
    state: Tensor,
    *,
    erase: bool = True,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Write and read a linear memory along a sequence; a token reads after its own write.

    Follows `S_t = alpha_t (I - eta_t k_t k_t^T) S_{t-1} + eta_t k_t v_t^T`, `o_t = S_t^T q_t` (Gated Delta Networks,
    arXiv 2412.06464, Eq. 10, transposed). Equal to `gated_delta_rule_naive` up to rounding, for any `T >= 0`. An
    `alpha_t` of 0, whose log is `-inf`, begins the memory anew at token `t`.

    Args:
        q: Queries `[B, T, G, D]`; a group's are those of its `H / G` heads.
        k: Keys like `q`; unit length keeps the erase bounded.
        v: Values `[B, T, H, Do]`.
        log_alpha: Logs of the retention, at most 0, `[B, T, H]`.
        eta: Inner learning rate `[B, T, H]`; None is 1.
        state: Memory before the first token `[B, H, D, Do]`, float32 (float64 in tests). Its type is computed in.
        erase: Whether a write first erases `eta_t k_t k_t^T`; False is plain gradient descent.
        chunk_size: Tokens per chunk; the last may be shorter. Changes only speed and rounding.

    Returns:
        Read values `[B, T, H, Do]` and the memory after the last token, in the type of `state`.

    Raises:
        ValueError: If shapes disagree, `chunk_size < 1`, or the state has another type.
    """
    check_gated_arguments(q, k, v, log_alpha, eta, state, chunk_size)
    tokens, groups = k.shape[1:3]
    whole = tokens - tokens % chunk_size
    state, outputs = state.unflatten(1, (groups, -1)), []
    for begin, end, size in ((0, whole, chunk_size), (whole, tokens, tokens - whole)):
        if begin == end:
            continue
        of_groups = (_in_chunks(x[:, begin:end], size, state.dtype) for x in (q, k))
        of_heads = (
            None if x is None else _in_chunks(x[:, begin:end], size, state.dtype).unflatten(1, (groups, -1))
            for x in (v, log_alpha, eta)
        )
        output, state = _run(*of_groups, *of_heads, state, erase=erase)
        outputs.append(output.flatten(3, 4))
    output = torch.cat(outputs, dim=3).flatten(1, 2) if outputs else v.to(state.dtype).transpose(1, 2)
    return output.transpose(1, 2), state.flatten(1, 2)


def _in_chunks(x: Tensor, size: int, kind: torch.dtype) -> Tensor:
    """Cut `[B, T, H, ...]` into chunks `[B, H, N, C, ...]`, in one piece, so that no product copies them again."""
    return x.to(kind).transpose(1, 2).unflatten(2, (-1, size)).contiguous()


def _run(
    q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, eta: Tensor | None, state: Tensor, *, erase: bool
) -> tuple[Tensor, Tensor]:
    """Run chunks of one length.

    Args:
        q: `[B, G, N, C, D]`.
        k: The same.
        v: `[B, G, S, N, C, Do]`, of the `S` heads of a group.
        log_alpha: `[B, G, S, N, C]`.
        eta: The same, or None.
        state: `[B, G, S, D, Do]`.
        erase: Whether writes erase.

    Returns:
        What is read, like `v`, and the state after the last chunk.
    """
    between, start = products_to_tokens(log_alpha), log_alpha.cumsum(-1).exp()
    written = v if eta is None else eta[..., None] * v
    if erase:
        first, written, state = _erasing(k, written, eta, between, start, state)
    else:
        entering = k.mT @ _side_by_side(between[..., -1, :, None] * written)  # [B, G, N, D, S Do]
        first, state = _decayed(_by_head(entering, v.shape[2]), start[..., -1], state)
    from_start = _by_head(q @ _side_by_side(first), v.shape[2])
    read = (between * (q @ k.mT)[:, :, None]) @ written
    return torch.addcmul(read, start[..., None], from_start), state


def _erasing(
    k: Tensor, written: Tensor, eta: Tensor | None, between: Tensor, start: Tensor, state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the states at the starts of chunks, the writes without the erases, and the last state."""
    rate = torch.ones_like(start) if eta is None else eta
    keys = k[:, :, None]
    system = (rate[..., None] * between).tril(-1) * (k @ k.mT)[:, :, None]
    right = torch.cat([written, (rate * start)[..., None] * keys], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    values, reads = solved.split([written.shape[-1], keys.shape[-1]], dim=-1)
    to_end = (between[..., -1, :, None] * keys).mT  # [B, G, S, N, D, C]
    states, entered = [], []
    parts = (values, reads, to_end, start[..., -1, None, None])
    for value, read, last, kept in zip(*(part.unbind(3) for part in parts), strict=True):
        states.append(state)
        entered.append(value - read @ state)
        state = torch.addcmul(last @ entered[-1], kept, state)
    return torch.stack(states, dim=3), torch.stack(entered, dim=3), state


def _decayed(entering: Tensor, kept: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states at the starts of chunks `[B, G, S, N, D, Do]`, and the last one."""
    states = []
    for enters, keep in zip(entering.unbind(3), kept[..., None, None].unbind(3), strict=True):
        states.append(state)
        state = torch.addcmul(enters, keep, state)
    return torch.stack(states, dim=3), state


def _side_by_side(x: Tensor) -> Tensor:
    """Lay the columns of a group's heads side by side: `[B, G, S, N, R, Do]` to `[B, G, N, R, S Do]`."""
    return x.permute(0, 1, 3, 4, 2, 5).flatten(-2)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """Undo `_side_by_side` for `heads` heads."""
    return x.unflatten(-1, (heads, -1)).permute(0, 1, 4, 2, 3, 5)
