"""The fused chunks as one differentiable operation: what is kept, and which kernel runs on what."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from hopescale.ops.self_modifying.packed import run_packed
from hopescale.ops.self_modifying.triton import scratch
from hopescale.ops.self_modifying.triton.backward import self_modify_back_kernel
from hopescale.ops.self_modifying.triton.forward import self_modify_kernel
from hopescale.ops.self_modifying.triton.kernel_config import KernelConfig
from hopescale.ops.self_modifying.types import Memories, MemorySpec, SelfModifyingOutput, Streams


def _run(
    kernel: triton.JITFunction, config: KernelConfig, chunk_size: int, matrices: int, k: Tensor, *tensors: Tensor | None
):
    """Run a kernel on every head of every sequence, with memory for that many matrices of a chunk's tokens."""
    batch, heads, tokens, _ = k.shape
    size = scratch.ROWS.value * config.rows + scratch.TABLES.value * config.rows**2 + matrices * config.matrix
    space = k.new_empty(batch * heads, size)
    with torch.cuda.device_of(k):
        kernel[(batch * heads,)](
            k, *tensors, space, tokens, chunk_size, size, CONFIG=config, num_warps=config.warps, num_stages=1
        )


class _SelfModify(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, spec: MemorySpec, k, v, q, eta, alpha, mu, running, momentum):
        streams, chunk_size = Streams(k, v, q, eta, alpha, mu), spec.chunk_size
        config, chunks = KernelConfig.of(streams, spec), -(-k.shape[2] // chunk_size)
        states = running.new_empty(*running.shape[:2], chunks + 1, config.size)
        states[:, :, 0] = running
        momenta = None
        if momentum is not None:
            momenta = torch.empty_like(states)
            momenta[:, :, 0] = momentum
        y, stats = torch.empty_like(q), q.new_empty(*q.shape[:3], 3)
        _run(
            self_modify_kernel, config, chunk_size, scratch.FORWARD_MATRICES.value, *streams, states, momenta, y, stats
        )
        ctx.config, ctx.chunk_size = config, chunk_size
        ctx.save_for_backward(*streams, states, momenta)
        ctx.mark_non_differentiable(stats)
        last_momentum = None if momenta is None else momenta[:, :, -1].clone()
        return y, stats, states[:, :, -1].clone(), last_momentum, states[:, :, -2].clone()

    @staticmethod
    @once_differentiable
    def backward(
        ctx: FunctionCtx, d_y: Tensor, _: None, d_last: Tensor, d_last_momentum: Tensor | None, d_start: Tensor
    ):
        config: KernelConfig = ctx.config
        *streams, states, momenta = ctx.saved_tensors
        pieces = -(-min(ctx.chunk_size, d_y.shape[2]) // config.rows)
        replayed = states.new_empty(*states.shape[:2], pieces - 1, config.size)
        replayed_momenta = None if momenta is None else torch.empty_like(replayed)
        # The kernel changes these in place.
        weights = [
            None if x is None else x.clone(memory_format=torch.contiguous_format)
            for x in (d_last, d_last_momentum, d_start)
        ]
        gradients = [None if x is None else torch.empty_like(x) for x in streams]
        tensors = (states, momenta, replayed, replayed_momenta, d_y.contiguous(), *weights, *gradients)
        _run(self_modify_back_kernel, config, ctx.chunk_size, scratch.BACKWARD_MATRICES.value, *streams, *tensors)
        return None, *gradients, *weights[:2]


def self_modifying_triton(streams: Streams, state: Memories, spec: MemorySpec) -> SelfModifyingOutput:
    """Run memories over a sequence that begins with a chunk, by kernels in float32. As `self_modifying`.

    Differentiable once in all tensors, through all outputs but the statistics.
    """
    return run_packed(_SelfModify, streams, state, spec, share=False)
