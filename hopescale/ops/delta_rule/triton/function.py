"""The recurrence as one differentiable operation: which kernel runs on what, with which sizes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hopescale.ops.delta_rule.triton.backward import read_back_kernel, states_back_kernel
from hopescale.ops.delta_rule.triton.forward import prepare_kernel, read_kernel, states_kernel
from hopescale.ops.delta_rule.triton.gradients import gates_kernel, keys_kernel, queries_kernel, values_kernel
from hopescale.ops.delta_rule.types import DeltaRuleOutput, Read, check_arguments
from hopescale.ops.limits import KERNEL_DIMS

LONGEST_CHUNK = 32
"""Tokens of a chunk where the length is free: the tables of longer chunks leave the registers."""


LONGEST_BOUNDARY_CHUNK = 64
"""Longest chunk that the kernels read the boundary of."""


class Grid(NamedTuple):
    """How the work is distributed.

    Attributes:
        tokens: Of a sequence.
        heads: Of a sequence.
        programs: Heads of all sequences.
        chunk: Tokens of a chunk.
        settings: Compile-time arguments, by name.
        warps: Of a program.
    """

    tokens: int
    heads: int
    programs: int
    chunk: int
    settings: dict[str, object]
    warps: int

    @property
    def chunks(self) -> tuple[int, int]:
        """One program per chunk and head."""
        return -(-self.tokens // self.chunk), self.programs

    @property
    def blocks(self) -> tuple[int, int, int]:
        """The same for each block of values."""
        return *self.chunks, self.settings["DO"] // self.settings["BV"]

    @property
    def memories(self) -> tuple[int, int]:
        """One program per head and block of values, which walks the chunks."""
        return self.programs, self.settings["DO"] // self.settings["BV"]

    def run(self, kernel: triton.JITFunction, where: tuple[int, ...], *tensors: Tensor | None) -> None:
        """Run a kernel with the settings it knows."""
        known = {name: self.settings[name] for name in kernel.arg_names if name in self.settings}
        with torch.cuda.device_of(tensors[0]):
            kernel[where](*tensors, self.tokens, self.heads, self.chunk, **known, num_warps=self.warps, num_stages=1)

    @classmethod
    def plan(cls, k: Tensor, u: Tensor, erase: bool, read: Read, chunk: int) -> Grid:
        """Share out the work on keys `[B, T, H, D]` and values `[B, T, H, Do]`."""
        batch, tokens, heads, dim = k.shape
        chunk = chunk if read == "boundary" else min(chunk, LONGEST_CHUNK)
        rows = max(16, triton.next_power_of_2(chunk))
        settings = {
            "D": dim,
            "DO": u.shape[-1],
            "BD": min(dim, 32),
            "BV": min(u.shape[-1] & -u.shape[-1], 32 if dim < 64 else 16),
            "C": rows,
            "DOUBLINGS": rows.bit_length() - 1,
            "ERASE": erase,
            "READ": read,
            "PRECISION": "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        }
        return cls(tokens, heads, batch * heads, chunk, settings, 4 if dim <= 64 else 8)


class Prepared(NamedTuple):
    """What `prepare_kernel` says about each chunk, all float32. None is what is not needed.

    Attributes:
        shares: Weights of a token's erase and write in the last state, and of its write in the last momentum
            `[B, T, H, 3]`.
        first_shares: Weights of the first state and momentum in the last state, and of the first momentum in the last
            `[B * H, N, 3]`.
        state_keys: What `held` takes from the first state: `held = state_keys S^T + momentum_keys Z^T + known`. Like
            keys.
        momentum_keys: What it takes from the first momentum.
        known: What it takes from the chunk's own writes. Like values.
        inverses: Of the triangular system `[B * H, N, C, C]`.
    """

    shares: Tensor
    first_shares: Tensor
    state_keys: Tensor | None
    momentum_keys: Tensor | None
    known: Tensor | None
    inverses: Tensor | None


def _prepare(
    grid: Grid, k: Tensor, u: Tensor, eta: Tensor, alpha: Tensor, mu: Tensor | None, backward: bool
) -> Prepared:
    erase, size = grid.settings["ERASE"], grid.settings["C"]
    chunks, programs = grid.chunks

    def new(*shape: int, needed: bool = True) -> Tensor | None:
        return torch.empty(shape, device=k.device) if needed else None

    prepared = Prepared(
        new(*eta.shape, 3),
        new(programs, chunks, 3),
        new(*k.shape, needed=erase),
        new(*k.shape, needed=erase and mu is not None),
        new(*u.shape, needed=erase and not backward),
        new(programs, chunks, size, size, needed=erase and backward),
    )
    grid.run(prepare_kernel, grid.chunks, k, u, eta, alpha, mu, *prepared)
    return prepared


class _DeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, grid: Grid, k, u, eta, alpha, state, q, mu, momentum):
        prepared = _prepare(grid, k, u, eta, alpha, mu, backward=False)
        chunks, programs = grid.chunks
        states = state.new_empty(programs, chunks, *state.shape[2:])
        momenta, last, last_momentum = None, torch.empty_like(state), None
        if mu is not None:
            momenta, last_momentum = torch.empty_like(states), torch.empty_like(state)
        held = None if prepared.known is None else torch.empty_like(prepared.known)
        tensors = (*prepared[:-1], state, momentum, states, momenta, held, last, last_momentum)
        grid.run(states_kernel, grid.memories, k, u, eta, *tensors)
        output = None
        if q is not None:
            output = torch.empty_like(u, dtype=q.dtype)
            grid.run(read_kernel, grid.blocks, k, u, q, eta, alpha, mu, states, momenta, held, output)
        ctx.grid = grid
        ctx.save_for_backward(k, u, eta, alpha, q, mu, states, momenta, held)
        return output, last, last_momentum

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_output: Tensor | None, d_last: Tensor, d_last_momentum: Tensor | None):
        grid: Grid = ctx.grid
        k, u, eta, alpha, q, mu, states, momenta, held = ctx.saved_tensors
        prepared = _prepare(grid, k, u, eta, alpha, mu, backward=True)
        chunks, programs = grid.chunks
        size = grid.settings["C"]
        d_written = torch.zeros_like(u, dtype=torch.float32)
        d_erased = None if mu is None or held is None else torch.zeros_like(held)
        read_shares, dq = None, _like(q)
        if q is not None:
            d_output, read_shares = d_output.contiguous(), d_written.new_empty(*eta.shape, 2)
            grid.run(read_back_kernel, grid.blocks, k, q, alpha, mu, d_output, d_written, d_erased, read_shares)
        d_states, d_momenta, d_state, d_momentum = _like(states), _like(momenta), _like(d_last), _like(d_last_momentum)
        weights = (prepared.shares, prepared.first_shares, read_shares, prepared.state_keys, prepared.momentum_keys)
        ends = (d_last.contiguous(), None if mu is None else d_last_momentum.contiguous())
        starts = (d_states, d_momenta, d_state, d_momentum)
        back = (d_output, d_written, d_erased)
        grid.run(states_back_kernel, grid.memories, k, q, eta, *weights, *back, *ends, *starts)

        dk, du, d_eta, d_alpha, d_mu = map(_like, (k, u, eta, alpha, mu))
        solved, d_tables = _like(held), states.new_empty(programs, chunks, 4, size, size)
        results = (du, d_eta, solved, d_tables)
        grid.run(values_kernel, grid.chunks, k, u, q, eta, alpha, mu, prepared.inverses, held, *back, *results)
        d_shares, d_first_shares = d_written.new_zeros(*eta.shape, 7), torch.zeros_like(prepared.first_shares)
        results = (d_tables, d_shares, d_first_shares)
        memories = (states, momenta, held, solved, d_states, d_momenta)
        grid.run(keys_kernel, grid.chunks, k, u, q, eta, alpha, mu, *memories, *results, dk)
        if q is not None:
            grid.run(queries_kernel, grid.chunks, k, q, alpha, mu, states, momenta, d_output, d_tables, d_shares, dq)
        grid.run(gates_kernel, grid.chunks, k, q, alpha, mu, *results, d_alpha, d_mu)
        return None, dk, du, d_eta, d_alpha, d_state, dq, d_mu, d_momentum


def _like(x: Tensor | None) -> Tensor | None:
    return None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)


def _check_shapes(k: Tensor, u: Tensor, state: Tensor, read: Read, chunk_size: int) -> None:
    if state.dtype != torch.float32:
        raise ValueError(f"the kernels compute in float32, state is {state.dtype}")
    if k.shape[-1] not in KERNEL_DIMS:
        raise ValueError(f"the kernels know keys of {', '.join(map(str, KERNEL_DIMS))} entries, k has {k.shape[-1]}")
    if u.shape[-1] % KERNEL_DIMS[0]:
        raise ValueError(f"the kernels know values of a multiple of {KERNEL_DIMS[0]} entries, u has {u.shape[-1]}")
    if read == "boundary" and chunk_size > LONGEST_BOUNDARY_CHUNK:
        limit = f"up to {LONGEST_BOUNDARY_CHUNK} tokens"
        raise ValueError(f"the kernels read the boundary of chunks {limit}, chunk_size is {chunk_size}")


def delta_rule_triton(
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
    """Run the gated delta rule by kernels. Same arguments, result and errors as `delta_rule`; `state` is float32."""
    check_arguments(k, u, eta, alpha, state, q, mu, momentum, read, chunk_size)
    _check_shapes(k, u, state, read, chunk_size)
    if k.shape[1] == 0:
        return DeltaRuleOutput(None if q is None else torch.zeros_like(u, dtype=q.dtype), state, momentum)
    if mu is not None and momentum is None:
        momentum = torch.zeros_like(state)
    tensors = (None if x is None else x.contiguous() for x in (k, u, eta, alpha, state, q, mu, momentum))
    return DeltaRuleOutput(*_DeltaRule.apply(Grid.plan(k, u, erase, read, chunk_size), *tensors))
