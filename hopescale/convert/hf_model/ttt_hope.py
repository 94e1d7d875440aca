"""Test-time training, TTT-Linear and TTT-MLP (arXiv 2407.04620): memories that learn from mini-batches of tokens.

What they have learned is the cache: it has the same size after ten tokens or a million.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .columns_hope import Columns, RowPosition, State, as_written, mix_groups

ROPE_THETA = 10_000.0
EPS = 1e-6


class HopeTttNorm(nn.Module):
    """Layer norm over all heads, in float32."""

    def __init__(self, heads: int, dim: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(heads, dim)), nn.Parameter(torch.zeros(heads, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., H, D]`."""
        x = x - x.mean((-2, -1), keepdim=True)
        return x * torch.rsqrt(x.square().mean((-2, -1), keepdim=True) + EPS) * self.weight + self.bias


class HopeTtt(nn.Module):
    """In-projection, memories per head that learn while they read, layer norm, gate, out-projection."""

    def __init__(self, model: SimpleNamespace, config: SimpleNamespace, dim: int):
        super().__init__()
        self.config, self.heads, self.dim, heads = config, model.num_heads, dim, model.num_heads
        self.slices = (2 if config.conv_width else 3) + config.gate
        self.in_proj = nn.Linear(model.d_model, heads * (self.slices * dim + 1), bias=False)
        self.conv = None
        if config.conv_width:
            self.conv = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(2 * heads * dim, config.conv_width))})
            self.conv["bias"] = nn.Parameter(torch.zeros(2 * heads * dim))
        hidden = config.memory_dim or 4 * dim
        shapes = {"1": (dim, dim)} if config.memory == "linear" else {"1": (hidden, dim), "2": (dim, hidden)}
        self.layers = list(shapes)
        self.banks = nn.ParameterDict({f"w{n}": nn.Parameter(torch.zeros(heads, *shapes[n])) for n in shapes})
        gates = {"rate": (heads,), "place": (config.chunk_size,)} | {f"b{n}": (heads, shapes[n][0]) for n in shapes}
        gates |= {"gamma": (heads, dim), "beta": (heads, dim)}
        self.gates = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, shape in gates.items()})
        self.norm = HopeTttNorm(heads, dim)
        self.out_proj = nn.Linear(heads * dim, model.d_model, bias=False)

    def initial_state(self, batch: int) -> State:
        """Return weights, sums of gradients, and the tail of the convolution."""
        state = {}
        for n in self.layers:
            weight, bias = self.banks[f"w{n}"].float().mT, self.gates[f"b{n}"].float()[:, None]
            state |= {f"w{n}": weight.expand(batch, *weight.shape), f"b{n}": bias.expand(batch, *bias.shape)}
        state |= {f"sum/{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
        if self.conv is not None:
            filters = self.conv["weight"]
            state["tail"] = filters.new_zeros(batch, filters.shape[1] - 1, self.heads * self.dim)
        return state

    def forward(self, x: Tensor, state: State, columns: Columns) -> tuple[Tensor, State]:
        """Mix `[B, T, N]`; padding neither teaches a memory nor counts as a token."""
        return mix_groups(self._run, x, state or self.initial_state(x.shape[0]), columns)

    def _run(self, x: Tensor, state: State, position: RowPosition) -> tuple[Tensor, State]:
        """Mix tokens without padding; of more than one token, all rows stand at the same place of a mini-batch."""
        state, size = dict(state), self.config.chunk_size
        mixed = self.in_proj(x).unflatten(-1, (self.heads, -1))  # [B, T, H, .]
        *slices, rate = mixed.split([self.dim] * self.slices + [1], dim=-1)
        if self.conv is not None:
            shared, *slices = slices
            convolved, state["tail"] = self._convolve(shared.flatten(2), state["tail"])
            slices = [*convolved.unflatten(-1, (self.heads, 2, self.dim)).unbind(3), *slices]
        q, k, v = (one.transpose(1, 2).float() for one in slices[:3])
        places = (position.tensor(x.device)[:, None] + torch.arange(x.shape[1], device=x.device)) % size  # [B, T]
        q, k = self._rotated(q, places), self._rotated(k, places)
        rate = torch.sigmoid(rate[..., 0].transpose(1, 2).float() + self.gates["rate"][:, None])
        steps = 1 / torch.arange(1, size + 1, device=x.device) + self.gates["place"]
        scale = steps.clamp_min(0) * self.config.rate / self.dim
        outputs, read = [], 0
        while read < x.shape[1]:
            part = slice(read, min(x.shape[1], read + size - (position.counts[0] + read) % size))
            tokens = (one[:, :, part] for one in (q, k, v, rate))
            with as_written(x):
                y, state = self._mini_batch(*tokens, places[:, part], scale, state)
            outputs.append(y)
            read = part.stop
        y = self.norm(torch.cat(outputs, dim=2).transpose(1, 2)).to(x.dtype)
        y = F.gelu(slices[3], approximate="tanh") * y if self.config.gate else y
        return self.out_proj(y.flatten(2)), state

    def _convolve(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys `[B, T, H * 2 * D]` of the shared projection, and the tail for the next call."""
        padded = torch.cat([tail.to(x.dtype), x], dim=1)
        both = padded.unflatten(-1, (self.heads, 1, self.dim)).expand(-1, -1, -1, 2, -1).flatten(2)
        weight, bias = (self.conv[name].to(x.dtype) for name in ("weight", "bias"))
        return F.conv1d(both.mT, weight[:, None], bias, groups=len(weight)).mT, padded[:, x.shape[1] :]

    def _rotated(self, x: Tensor, places: Tensor) -> Tensor:
        frequencies = ROPE_THETA ** (-torch.arange(0, self.dim, 2, device=x.device).float() / self.dim)
        angles = places[:, None, :, None].float() * frequencies
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def _mini_batch(
        self, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, places: Tensor, scale: Tensor, state: State
    ) -> tuple[Tensor, State]:
        """Answer queries of one mini-batch `[B, H, C, D]`, or of a part of one, and learn from its keys and values."""
        state, z = dict(state), q
        ends = (places[:, -1] == self.config.chunk_size - 1)[:, None, None, None]
        for n, (x, g) in zip(self.layers, self._learned(k, v, state), strict=True):
            z = z if n == "1" else F.gelu(z, approximate="tanh")
            w, b, w_sum, b_sum = (state[name] for name in (f"w{n}", f"b{n}", f"sum/w{n}", f"sum/b{n}"))
            moved = ((z @ x.mT + 1) * rate[..., None, :]).tril() @ g + z @ w_sum + b_sum
            z = z @ w + b - scale[places][:, None, :, None] * moved
            steps = rate[..., None] * g
            for name, step in ((f"w{n}", x.mT @ steps), (f"b{n}", steps.sum(-2, keepdim=True))):
                total = state[f"sum/{name}"] + step
                state[name] = torch.where(ends, state[name] - scale[-1] * total, state[name])
                state[f"sum/{name}"] = torch.where(ends, 0.0, total)
        normed, _ = self._normed(z)
        return q + self.gates["gamma"][:, None] * normed + self.gates["beta"][:, None], state

    def _learned(self, k: Tensor, v: Tensor, state: State) -> list[tuple[Tensor, Tensor]]:
        """Return the input of each layer for the keys, and the gradient with respect to its output."""
        z = k @ state["w1"] + state["b1"]
        if len(self.layers) == 1:
            return [(k, self._gradient(z, v - k))]
        hidden, root = F.gelu(z, approximate="tanh"), math.sqrt(2 / math.pi)
        gradient = self._gradient(hidden @ state["w2"] + state["b2"], v - k)
        tanh = torch.tanh(root * (z + 0.044715 * z**3))
        slope = 0.5 * (1 + tanh) + 0.5 * z * (1 - tanh.square()) * root * (1 + 3 * 0.044715 * z.square())
        return [(k, gradient @ state["w2"].mT * slope), (hidden, gradient)]

    def _normed(self, z: Tensor) -> tuple[Tensor, Tensor]:
        centred = z - z.mean(-1, keepdim=True)
        factor = torch.rsqrt(centred.square().mean(-1, keepdim=True) + EPS)
        return centred * factor, factor

    def _gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """Return the gradient of `1/2 |LN(z) - target|^2`."""
        (normed, factor), gamma = self._normed(z), self.gates["gamma"][:, None]
        g = (gamma * normed + self.gates["beta"][:, None] - target) * gamma
        return factor * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))
