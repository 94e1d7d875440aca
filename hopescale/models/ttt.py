"""Test-time training as a mixer: TTT-Linear and TTT-MLP (arXiv 2407.04620)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hopescale.config.model_shape import head_dim
from hopescale.config.schema import ModelConfig
from hopescale.config.schema.ttt import TttConfig
from hopescale.config.ttt import ttt_hidden, ttt_parts, ttt_slices
from hopescale.models.state import LayerState
from hopescale.ops.documents import Documents
from hopescale.ops.rope import rope_frequencies, rope_tables, rotate
from hopescale.ops.short_conv import linear_conv
from hopescale.ops.ttt import TttMemory, TttState, TttStreams, TttWeights, ttt
from hopescale.parallel.layers import ColumnLinear, ParameterSpec, RowLinear, new_parameter
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.regions import share_with_ranks, sum_over_ranks

ROPE_THETA = 10_000.0
MEMORY_STD = 0.02
"""Standard deviation of the memories' initial weights, as in the authors' code."""
EPS = 1e-6
"""Number added to variances in the layer norms, as in the authors' code."""


class TttMixerState(NamedTuple):
    """State of the mixer: the memories, and the convolution's last inputs `[B, W - 1, channels]` or None."""

    memory: TttState
    conv_tail: Tensor | None


class WholeLayerNorm(nn.Module):
    """Layer norm over all heads of all tensor-parallel ranks, each of which holds its heads' weights.

    Two sums over ranks, of one number per token each, make mean and variance those of the whole.
    """

    def __init__(self, heads: int, dim: int, *, mesh: Mesh):
        super().__init__()
        self.mesh, self.width = mesh, heads * dim * mesh.tp_group.size()
        self.weight = new_parameter(heads, dim, spec=ParameterSpec(mean=1.0, partition_dim=0, keep_fp32=True))
        self.bias = new_parameter(heads, dim, spec=ParameterSpec(partition_dim=0, keep_fp32=True))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., H, D]` over the last two dimensions, of all ranks."""
        x = x - self._mean(x)
        return x * torch.rsqrt(self._mean(x.square()) + EPS) * self.weight + self.bias

    def _mean(self, x: Tensor) -> Tensor:
        return sum_over_ranks(x.sum((-2, -1)), self.mesh)[..., None, None] / self.width


class Ttt(nn.Module):
    """In-projection, memories per head that learn by `ops.ttt`, layer norm over all heads, gate, out-projection.

    The in-projection's rows are, head after head: keys and queries, shared or apart, values, output gates, and one for
    the token's learning rate. Rotary positions are those within a mini-batch, and turn halves of a head where the
    authors turn pairs: another order of channels, no other model. Heads are split over tensor-parallel ranks.

    Args:
        model: Sizes that the mixer takes over.
        config: Settings of the mixer.
        out_std: Standard deviation of the out-projection's initial weights.
        mesh: Ranks of the run, and this process among them.
    """

    def __init__(self, model: ModelConfig, config: TttConfig, *, out_std: float, mesh: Mesh):
        super().__init__()
        dim, ranks = head_dim(model), mesh.tp_group.size()
        self.config, self.head_dim, self.mesh = config, dim, mesh
        self.heads, width = model.num_heads // ranks, model.num_heads * dim
        inputs = model.num_heads * (ttt_slices(config) * dim + 1)
        how = {"std": model.d_model**-0.5, "parts": ttt_parts(model, config)}
        self.in_proj = ColumnLinear(model.d_model, inputs, mesh=mesh, **how)
        split = {"partition_dim": 0, "keep_fp32": True}
        self.conv = None
        if config.conv_width:
            # Of each head the filters of queries, then those of keys.
            channels, spec = 2 * self.heads * dim, ParameterSpec(std=config.conv_width**-0.5, **split)
            self.conv = nn.ParameterDict({"weight": new_parameter(channels, config.conv_width, spec=spec)})
            self.conv["bias"] = new_parameter(channels, spec=ParameterSpec(**split))
        hidden = ttt_hidden(model, config)
        self.banks = nn.ParameterDict()
        self.gates = nn.ParameterDict({"rate": new_parameter(self.heads, spec=ParameterSpec(**split))})
        # A token's step is divided by its place in the mini-batch, from 1 on, plus a learned number.
        self.gates["place"] = new_parameter(config.chunk_size, spec=ParameterSpec(keep_fp32=True))
        kind = "head" if config.memory_dim is None else "one"
        shapes = [(dim, dim)] if hidden is None else [(hidden, dim), (dim, hidden)]
        sizes = [("head", "head")] if hidden is None else [(kind, "head"), ("head", kind)]
        for number, (shape, size) in enumerate(zip(shapes, sizes, strict=True), 1):
            std = MEMORY_STD if number == 1 else MEMORY_STD * (2 * model.num_layers) ** -0.5
            self.banks[f"w{number}"] = new_parameter(
                self.heads, *shape, spec=ParameterSpec(std=std, sizes=size, **split)
            )
            self.gates[f"b{number}"] = new_parameter(self.heads, shape[0], spec=ParameterSpec(**split))
        self.gates["gamma"] = new_parameter(self.heads, dim, spec=ParameterSpec(mean=1.0, **split))
        self.gates["beta"] = new_parameter(self.heads, dim, spec=ParameterSpec(**split))
        self.norm = WholeLayerNorm(self.heads, dim, mesh=mesh)
        self.out_proj = RowLinear(width, model.d_model, std=out_std, mesh=mesh)

    def initial_state(self, batch: int) -> LayerState:
        """Return the learned initial state for `batch` sequences."""
        tail = None
        if self.conv is not None:
            taps, channels = self.config.conv_width - 1, self.heads * self.head_dim
            tail = self.conv["weight"].new_zeros(taps, batch, channels).transpose(0, 1)
        return LayerState(0, TttMixerState(self._initial_memory(batch), tail))

    def _initial_memory(self, batch: int) -> TttState:
        def expand(x: Tensor) -> Tensor:
            return x.to(torch.promote_types(x.dtype, torch.float32)).expand(batch, *x.shape).contiguous()

        parts = [None] * 4
        for number in range(len(self.banks)):
            weight, bias = self.banks[f"w{number + 1}"], self.gates[f"b{number + 1}"]
            parts[2 * number : 2 * number + 2] = expand(weight.mT), expand(bias[:, None])
        weights = TttWeights(*parts)
        return TttState(weights, weights.map(torch.zeros_like))

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        documents: Documents | None = None,
        probe: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        """Mix tokens `x`, residual activations.

        Args:
            state: State after an earlier call; None begins at the learned initial state.
            documents: Documents of all tokens, also where `x` is this rank's share of them; at the first token of each,
                memories, the convolution's tail and the grid of mini-batches begin anew. None takes a sequence for one
                document.
            probe: Dict to be filled with the mean `eta_mean` of the learned part of the learning rate, in (0, 1).

        Returns:
            Residual activations and the state after the last token. After several documents, its tensors are those
            after the last document of each sequence; its position counts all tokens.

        Raises:
            ValueError: If documents are not those of the tokens, or go on from earlier tokens without their state, or
                the reverse.
        """
        position, (memory, tail) = self.initial_state(x.shape[1]) if state is None else state
        mixed = self.in_proj(x).unflatten(-1, (self.heads, -1))  # [T, B, H, .]
        first = None if documents is None else documents.first_of(mixed.shape[1], mixed.shape[0], position)
        streams, z, tail = self._streams(mixed, tail, position, first)
        if probe is not None:
            probe["eta_mean"] = streams.rate.detach().mean()
        if documents is None:
            y, memory = ttt(streams, memory, self._inner(), position=position)
        else:
            before = memory if position else None
            y, memory = ttt(streams, self._initial_memory(1), self._inner(), documents=documents, before=before)
        y = self.norm(y.permute(2, 0, 1, 3)).to(x.dtype)  # [T, B, H, D]
        y = y if z is None else F.gelu(z, approximate="tanh") * y
        return self.out_proj(y.flatten(2)), LayerState(position + len(y), TttMixerState(memory, tail))

    def _streams(
        self, mixed: Tensor, tail: Tensor | None, position: int, first: Tensor | None
    ) -> tuple[TttStreams, Tensor | None, Tensor | None]:
        """Return the inputs of memories, float32, the output gate `[T, B, H, D]`, and the convolution's tail."""
        *slices, rate = mixed.split([self.head_dim] * ttt_slices(self.config) + [1], dim=-1)
        if self.conv is not None:
            shared, *slices = slices
            weight, bias = (self.conv[name].to(shared.dtype) for name in ("weight", "bias"))
            both = shared[..., None, :].expand(-1, -1, -1, 2, -1).flatten(2)
            tails = tail.transpose(0, 1).unflatten(-1, (self.heads, 1, self.head_dim)).expand(-1, -1, -1, 2, -1)
            both, tails = linear_conv(both, weight, tails.flatten(2), first, bias)
            tail = tails.unflatten(-1, (self.heads, 2, self.head_dim))[..., 0, :].flatten(2).transpose(0, 1)
            slices = [*both.unflatten(-1, (self.heads, 2, self.head_dim)).unbind(3), *slices]
        wide = torch.promote_types(mixed.dtype, torch.float32)
        q, k, v, rate = (one.permute(1, 2, 0, 3).to(wide) for one in (*slices[:3], rate))
        tables = self._rotation(position, len(mixed), first, mixed.device)
        rate = torch.sigmoid(rate[..., 0] + self.gates["rate"][:, None])
        z = slices[3].contiguous() if self.config.gate else None
        return TttStreams(rotate(q, tables), rotate(k, tables), v, rate), z, tail

    def _rotation(
        self, position: int, tokens: int, first: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Return tables by place in a mini-batch, `[T, D / 2]`, or `[B, 1, T, D / 2]` within documents."""
        size = self.config.chunk_size
        cos, sin = rope_tables(0, size, rope_frequencies(self.head_dim, ROPE_THETA, device))
        places = torch.arange(tokens, device=device)
        if first is None:
            places = (position + places) % size
            return cos[places], sin[places]
        places = (places - first) % size
        return cos[places][:, None], sin[places][:, None]

    def _inner(self) -> TttMemory:
        places = torch.arange(1, self.config.chunk_size + 1, device=self.gates["place"].device)
        learned = share_with_ranks(self.gates["place"], self.mesh)
        scale = (1 / places + learned).clamp_min(0) * self.config.rate / self.head_dim
        return TttMemory(scale, self.gates["gamma"][:, None], self.gates["beta"][:, None], EPS)
