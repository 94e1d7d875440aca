"""Mixers with a linear memory per head: linear attention, RetNet, DeltaNet, Gated DeltaNet, Mamba-2.

The memories and the last inputs of the convolution are the cache: it has the same size after ten tokens or a million.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .columns_hope import Columns, Norm, RowPosition, State, as_written, mix_groups, to_unit

ROPE_THETA = 10_000.0


class HopeLinearAttention(nn.Module):
    """In-projection, short convolution, a linear memory per head, norm, gate, out-projection.

    The in-projection's rows are, for each group of heads: a query, a key, the heads' values, their output gates, and
    numbers of each head, `dt` and `eta`.
    """

    def __init__(self, model: SimpleNamespace, config: SimpleNamespace, dim: int):
        super().__init__()
        self.config, self.eps = config, model.norm_eps
        self.heads = config.num_heads or model.num_heads
        self.groups = config.key_groups or self.heads
        self.keys, self.values = config.key_dim or dim, config.value_dim or dim
        shared = self.heads // self.groups
        streams, gate = 2 * self.keys + shared * self.values, shared * self.values * (config.output_gate != "none")
        self.numbers = ["dt"] * (config.decay == "input") + ["eta"] * (config.write == "sigmoid")
        self.widths = [streams, gate, *[shared] * len(self.numbers)]
        self.in_proj = nn.Linear(model.d_model, self.groups * sum(self.widths), bias=False)
        self.conv = None
        if config.conv_width:
            self.conv = nn.ParameterDict(
                {"weight": nn.Parameter(torch.zeros(self.groups * streams, config.conv_width))}
            )
            if config.conv_bias:
                self.conv["bias"] = nn.Parameter(torch.zeros(self.groups * streams))
        per_head = ["A_log", "dt_bias"] * (config.decay == "input") + ["D"] * config.skip
        self.gates = nn.ParameterDict({name: nn.Parameter(torch.zeros(self.heads)) for name in per_head})
        self.norm = None
        if config.norm_weight == "shared":
            self.norm = Norm(self.values, eps=self.eps)
        elif config.norm_weight == "own":
            spans = self.heads if config.norm == "head" else self.groups
            self.norm = Norm(spans, self.heads * self.values // spans, eps=self.eps)
        self.out_proj = nn.Linear(self.heads * self.values, model.d_model, bias=False)

    def initial_state(self, batch: int) -> State:
        """Return empty memories, and an empty tail of the convolution."""
        weight = self.in_proj.weight
        shape = (batch, self.heads, self.keys, self.values)
        state = {"memory": torch.zeros(shape, device=weight.device)}
        if self.conv is not None:
            filters = self.conv["weight"]
            state["tail"] = filters.new_zeros(batch, filters.shape[1] - 1, filters.shape[0])
        return state

    def forward(self, x: Tensor, state: State, columns: Columns) -> tuple[Tensor, State]:
        """Mix `[B, T, N]`; padding neither moves a memory nor counts as a token."""
        return mix_groups(self._run, x, state or self.initial_state(x.shape[0]), columns)

    def _run(self, x: Tensor, state: State, position: RowPosition) -> tuple[Tensor, State]:
        """Mix tokens without padding."""
        state = dict(state)
        streams, z, *numbers = self.in_proj(x).unflatten(-1, (self.groups, -1)).split(self.widths, dim=-1)
        if self.conv is not None:
            streams, state["tail"] = self._convolve(streams.flatten(2), state["tail"])
            streams = streams.unflatten(-1, (self.groups, -1))
        q, k, v = streams.float().split([self.keys, self.keys, self.widths[0] - 2 * self.keys], dim=-1)
        q, k = (self._by_head(one, position) for one in (q, k))
        v = v.flatten(2).unflatten(-1, (self.heads, self.values)).transpose(1, 2)  # [B, H, T, Do]
        q = q * self.keys**-0.5 if self.config.query_scale else q
        given = zip(self.numbers, numbers, strict=True)
        log_alpha, eta = self._rates({name: number.flatten(2).mT.float() for name, number in given}, v)
        outputs, size = [], self.config.chunk_size
        for parts in zip(*(one.split(size, dim=2) for one in (q, k, v, log_alpha, eta)), strict=True):
            with as_written(x):
                y, state["memory"] = self._chunk(*parts, state["memory"])
            outputs.append(y)
        y = torch.cat(outputs, dim=2)
        y = y + self.gates["D"][:, None, None] * v if self.config.skip else y
        return self.out_proj(self._gated_norm(y.transpose(1, 2).flatten(2), z).to(x.dtype)), state

    def _convolve(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = (self.conv[name].to(x.dtype) if name in self.conv else None for name in ("weight", "bias"))
        padded = torch.cat([tail.to(x.dtype), x], dim=1)
        return F.silu(F.conv1d(padded.mT, weight[:, None], bias, groups=len(weight))).mT, padded[:, x.shape[1] :]

    def _by_head(self, x: Tensor, position: RowPosition) -> Tensor:
        """Turn queries or keys of groups `[B, T, G, D]` into those of heads `[B, H, T, D]`."""
        x = to_unit(x) if self.config.key_norm == "l2" else x
        x = x.transpose(1, 2)
        if self.config.rotary:
            places = position.tensor(x.device)[:, None] + torch.arange(x.shape[2], device=x.device)
            frequencies = ROPE_THETA ** (-torch.arange(0, self.keys, 2, device=x.device).float() / self.keys)
            angles = places[:, None, :, None].float() * frequencies
            first, second = x.chunk(2, dim=-1)
            cos, sin = angles.cos(), angles.sin()
            x = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return x.repeat_interleave(self.heads // self.groups, dim=1)

    def _rates(self, numbers: State, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return logs of the retention, and inner learning rates `[B, H, T]`."""
        config, log_alpha, step = self.config, torch.zeros_like(v[..., 0]), None
        if config.decay == "fixed":
            head = torch.arange(self.heads, device=v.device, dtype=v.dtype)
            log_alpha = log_alpha + torch.log1p(-(2.0 ** (-5 - head)))[:, None]
        elif config.decay == "input":
            step = F.softplus(numbers["dt"] + self.gates["dt_bias"][:, None])
            log_alpha = -self.gates["A_log"].exp()[:, None] * step
        if config.write == "step":
            return log_alpha, step
        return log_alpha, torch.sigmoid(numbers["eta"]) if config.write == "sigmoid" else torch.ones_like(log_alpha)

    def _chunk(
        self, q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, eta: Tensor, memory: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Write and read the memory `[B, H, D, Do]` over a chunk; tokens read after their own write.

        `S_t = alpha_t (I - eta_t k_t k_t^T) S_{t-1} + eta_t k_t v_t^T`; where writes do not erase, `I` stands alone.
        """
        if log_alpha.shape[-1] == 1:
            kept = log_alpha.exp()[..., None] * memory
            memory = torch.addcmul(kept, k.mT, eta[..., None] * (v - k @ kept if self.config.erase else v))
            return q @ memory, memory
        size = log_alpha.shape[-1]
        steps = log_alpha[..., None].expand(*log_alpha.shape, size).tril(-1)
        between, start = steps.cumsum(-2).exp().tril(), log_alpha.cumsum(-1).exp()[..., None]
        written = eta[..., None] * v
        if self.config.erase:
            right = written - eta[..., None] * start * (k @ memory)
            system = (eta[..., None] * between).tril(-1) * (k @ k.mT)
            written = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        y = start * (q @ memory) + (between * (q @ k.mT)) @ written
        return y, start[..., -1:, :] * memory + (between[..., -1, :, None] * k).mT @ written

    def _gated_norm(self, y: Tensor, z: Tensor) -> Tensor:
        """Normalise and gate answers `[B, T, H Do]`."""
        gate = F.silu(z.flatten(2).float())
        y = y * gate if self.config.output_gate == "before_norm" else y
        y = y.unflatten(-1, (self.heads if self.config.norm == "head" else self.groups, -1))
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps) if self.norm is None else self.norm(y)
        return y.flatten(2) * gate if self.config.output_gate == "after_norm" else y.flatten(2)
