"""Mixers with a linear memory per head: linear attention, RetNet, DeltaNet, Gated DeltaNet, Mamba-2."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hopescale.config.linear_attention import LinearSizes
from hopescale.config.model_shape import head_dim
from hopescale.config.schema import ModelConfig
from hopescale.config.schema.linear_attention import LinearAttentionConfig
from hopescale.models.norm import RMSNorm
from hopescale.models.state import LayerState
from hopescale.ops.delta_rule import gated_delta_rule
from hopescale.ops.documents import Documents
from hopescale.ops.norm import l2_norm, rms_norm
from hopescale.ops.rope import rope_frequencies, rope_tables, rotate
from hopescale.ops.short_conv import short_conv
from hopescale.parallel.layers import ColumnLinear, ParameterSpec, RowLinear, new_parameter
from hopescale.parallel.mesh import Mesh

ROPE_THETA = 10_000.0
STEP_FLOOR = 1e-4
"""Least `Delta` at initialisation, as in Mamba-2's own code."""


class LinearAttentionState(NamedTuple):
    """State of the mixer.

    Attributes:
        memory: Memories `[B, H, D, Do]`, float32.
        conv_tail: Projected inputs of the last tokens `[B, W - 1, channels]`; None without a convolution.
    """

    memory: Tensor
    conv_tail: Tensor | None


class LinearAttention(nn.Module):
    """In-projection, short convolution, a linear memory per head, norm, gate, out-projection.

    The memory follows `ops.delta_rule.gated_delta_rule`. The in-projection's rows are, group after group: a query, a
    key, the values of the group's heads, their output gates, then of each of its heads `dt` and `eta`. Groups are split
    over tensor-parallel ranks; the recurrence and the norm communicate nothing.

    Conventions, where published code has several: RetNet (arXiv 2307.08621) rotates halves of a head, and its norm has
    no weights, as in its authors' code. DeltaNet (arXiv 2406.06484) and Gated DeltaNet (arXiv 2412.06464) divide
    queries by the root of `D`, as in FLA. Mamba-2 (arXiv 2405.21060) normalises each group apart, so that ranks which
    divide the groups compute the same (section 8.1); its rates are drawn from 1 to 16, as in its authors' code.

    Args:
        model: Sizes that the mixer takes over where its own config has none.
        config: Settings of the mixer.
        out_std: Standard deviation of the initial weights of an out-projection with the model's `num_heads * head_dim`
            inputs; one with more inputs has smaller weights, and its output the same size.
        mesh: Ranks of the run, and this process among them.

    Raises:
        ValueError: If the tensor-parallel ranks do not divide the groups of heads.
    """

    def __init__(self, model: ModelConfig, config: LinearAttentionConfig, *, out_std: float, mesh: Mesh):
        super().__init__()
        sizes, ranks = LinearSizes.of(model, config), mesh.tp_group.size()
        if sizes.groups % ranks:
            raise ValueError(f"{sizes.groups} groups of heads cannot be split evenly over {ranks} ranks")
        self.config, self.sizes, self.eps = config, sizes, model.norm_eps
        self.groups, self.heads = sizes.groups // ranks, sizes.heads // ranks
        self.first_head = mesh.tp_group.rank() * self.heads
        inputs = sizes.groups * sizes.group_inputs
        self.in_proj = ColumnLinear(model.d_model, inputs, std=model.d_model**-0.5, mesh=mesh, parts=sizes.parts)
        self.conv = None
        split = {"partition_dim": 0, "keep_fp32": True}
        if config.conv_width:
            channels = self.groups * sizes.group_streams
            spec = ParameterSpec(std=config.conv_width**-0.5, **split)
            self.conv = nn.ParameterDict({"weight": new_parameter(channels, config.conv_width, spec=spec)})
            if config.conv_bias:
                self.conv["bias"] = new_parameter(channels, spec=ParameterSpec(**split))
        self.gates = nn.ParameterDict()
        for name, spec in _gate_specs(config, split).items():
            self.gates[name] = new_parameter(self.heads, spec=spec)
        self.norm = self._norm(mesh)
        out_std *= (model.num_heads * head_dim(model) / sizes.width) ** 0.5
        self.out_proj = RowLinear(sizes.width, model.d_model, std=out_std, mesh=mesh)

    def _norm(self, mesh: Mesh) -> RMSNorm | None:
        config, sizes = self.config, self.sizes
        if config.norm_weight == "none":
            return None
        if config.norm_weight == "shared":
            return RMSNorm(sizes.value_dim, eps=self.eps, shared_over=mesh)
        shape = (self.heads, sizes.value_dim) if config.norm == "head" else (self.groups, sizes.group_values)
        return RMSNorm(*shape, eps=self.eps, partition_dim=0)

    def initial_state(self, batch: int) -> LayerState:
        """Return empty memories for `batch` sequences."""
        weight, tail = self.in_proj.weight, None
        kind = torch.promote_types(weight.dtype, torch.float32)
        memory = weight.new_zeros(batch, self.heads, self.sizes.key_dim, self.sizes.value_dim, dtype=kind)
        if self.conv is not None:
            filters = self.conv["weight"]
            tail = filters.new_zeros(filters.shape[1] - 1, batch, filters.shape[0]).transpose(0, 1)
        return LayerState(0, LinearAttentionState(memory, tail))

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        documents: Documents | None = None,
        probe: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        """Mix tokens `x`, residual activations.

        Args:
            state: State after an earlier call; None begins with empty memories.
            documents: Documents of all tokens, also where `x` is this rank's share of them; at the first token of each,
                memories, the convolution's tail and positions begin anew. None takes a sequence for one document.
            probe: Dict to be filled with scalar means of this call: `alpha_mean` with `decay: input`, `eta_mean` unless
                `write` is `one`.

        Returns:
            Residual activations and the state after the last token, that of the last document of each sequence.

        Raises:
            ValueError: If documents are not those of the tokens, or go on from earlier tokens without their state, or
                the reverse.
        """
        position, (memory, tail) = self.initial_state(x.shape[1]) if state is None else state
        mixed = self.in_proj(x).unflatten(-1, (self.groups, -1))  # [T, B, G, .]
        first = None if documents is None else documents.first_of(mixed.shape[1], mixed.shape[0], position)
        streams, z, numbers = self._cut(mixed)
        if self.conv is not None:
            streams, tail = self._convolve(streams, tail, first)
        q, k, v = self._heads(streams.to(memory.dtype))
        if self.config.rotary:
            frequencies = rope_frequencies(self.sizes.key_dim, ROPE_THETA, x.device)
            tables = rope_tables(position if first is None else 0, len(mixed), frequencies, first)
            q, k = (rotate(one.transpose(1, 2), tables).transpose(1, 2) for one in (q, k))
        log_alpha, eta = self._rates(numbers, v)
        if probe is not None:
            means = {"alpha_mean": log_alpha.detach().exp() if self.config.decay == "input" else None, "eta_mean": eta}
            probe |= {name: gate.detach().mean() for name, gate in means.items() if gate is not None}
        if first is not None:
            begins = torch.arange(len(mixed), device=x.device) == first
            log_alpha = log_alpha.masked_fill(begins[..., None], float("-inf"))
        how = {"erase": self.config.erase, "chunk_size": self.config.chunk_size}
        y, memory = gated_delta_rule(q, k, v, log_alpha, eta, memory, **how)
        if self.config.skip:
            y = y + self.gates["D"][:, None] * v
        y = self._gated_norm(y.transpose(0, 1), z).to(x.dtype)
        return self.out_proj(y), LayerState(position + len(y), LinearAttentionState(memory, tail))

    def _convolve(self, streams: Tensor, tail: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
        weight, bias = (self.conv[name].to(streams.dtype) if name in self.conv else None for name in ("weight", "bias"))
        streams, tail = short_conv(streams.flatten(2), weight, tail.transpose(0, 1), first, bias)
        return streams.unflatten(-1, (self.groups, -1)), tail.transpose(0, 1)

    def _cut(self, mixed: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Cut `[T, B, G, .]` into streams `[T, B, G, .]`, output gates `[T, B, H Do]`, and numbers `[B, T, H]` by name.

        Numbers are float32.
        """
        sizes, wide = self.sizes, torch.promote_types(mixed.dtype, torch.float32)
        widths = [sizes.group_streams, sizes.gated * sizes.group_values, *[sizes.shared_by] * len(sizes.gates)]
        streams, z, *numbers = mixed.split(widths, dim=-1)
        named = {
            name: number.flatten(2).transpose(0, 1).to(wide) for name, number in zip(sizes.gates, numbers, strict=True)
        }
        return streams, z.flatten(2).contiguous() if sizes.gated else None, named

    def _heads(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys `[B, T, G, D]` and values `[B, T, H, Do]` of streams `[T, B, G, .]`."""
        sizes = self.sizes
        q, k, v = streams.transpose(0, 1).split([sizes.key_dim, sizes.key_dim, sizes.group_values], dim=-1)
        if self.config.key_norm == "l2":
            q, k = l2_norm(q), l2_norm(k)
        if self.config.query_scale:
            q = q * sizes.key_dim**-0.5
        return q, k, v.flatten(2).unflatten(-1, (self.heads, sizes.value_dim))

    def _rates(self, numbers: dict[str, Tensor], like: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logs of the retention, and learning rates or None where all are 1, like the values, `[B, T, H]`."""
        config, step = self.config, None
        log_alpha = like.new_zeros(()).expand(like.shape[:-1])
        if config.decay == "fixed":
            head = torch.arange(self.first_head, self.first_head + self.heads, device=like.device, dtype=like.dtype)
            log_alpha = torch.log1p(-(2.0 ** (-5 - head))).expand(like.shape[:-1])
        elif config.decay == "input":
            step = F.softplus(numbers["dt"] + self.gates["dt_bias"])
            log_alpha = -self.gates["A_log"].exp() * step
        if config.write == "step":
            return log_alpha, step
        return log_alpha, torch.sigmoid(numbers["eta"]) if config.write == "sigmoid" else None

    def _gated_norm(self, y: Tensor, z: Tensor | None) -> Tensor:
        """Normalise and gate answers `[T, B, H, Do]`: `[T, B, H Do]`."""
        gate = None if z is None else F.silu(z.to(y.dtype))
        y = y.flatten(2)
        if self.config.output_gate == "before_norm":
            y = y * gate
        y = y.unflatten(-1, (self.heads if self.config.norm == "head" else self.groups, -1))
        y = rms_norm(y, y.new_ones(()), self.eps) if self.norm is None else self.norm(y)
        return y.flatten(2) * gate if self.config.output_gate == "after_norm" else y.flatten(2)


def _gate_specs(config: LinearAttentionConfig, split: dict[str, object]) -> dict[str, ParameterSpec]:
    """Return names and starts of the numbers per head."""
    specs = {}
    if config.decay == "input":
        of_rate = partial(_log_of_rate, low=config.a_min, high=config.a_max)
        of_step = partial(_bias_of_step, low=math.log(config.step_min), high=math.log(config.step_max))
        specs["A_log"] = ParameterSpec(of_uniform=of_rate, **split)
        specs["dt_bias"] = ParameterSpec(of_uniform=of_step, **split)
    if config.skip:
        specs["D"] = ParameterSpec(mean=1.0, **split)
    return specs


def _log_of_rate(u: Tensor, low: float, high: float) -> Tensor:
    return torch.log(low + (high - low) * u)


def _bias_of_step(u: Tensor, low: float, high: float) -> Tensor:
    """Return a bias that softplus maps to a step whose log lies between `low` and `high`."""
    step = torch.exp(low + (high - low) * u).clamp_min(STEP_FLOOR)
    return step + torch.log(-torch.expm1(-step))
