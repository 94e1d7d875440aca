"""Self-modifying Titans (Nested Learning, arXiv 2512.24695, Eq. 83-91): the mixer of Hope."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate, repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hopescale.config.model_shape import has_chunk_loop
from hopescale.config.schema import SelfModifyingConfig
from hopescale.models.memory import KEY_EPS, BankState, MemoryBank, Trace, WriteSpec
from hopescale.models.norm import RMSNorm
from hopescale.models.state import LayerState
from hopescale.ops.delta_rule import decay_weights, delta_rule
from hopescale.ops.head_streams import head_streams
from hopescale.ops.limits import REVERSE_PARTS
from hopescale.ops.norm import l2_norm
from hopescale.ops.scan import Replay, scan
from hopescale.ops.self_modifying import Backend, MemorySpec, Streams, Weights, fused_chunks
from hopescale.parallel.layers import ColumnLinear, ParameterSpec, RowLinear, new_parameter
from hopescale.parallel.mesh import Mesh

LAYER_KEYS = ("first", "wide", "narrow")
"""Names of the fields of `Weights` in files."""


class Gate(nn.Module):
    """A number per head and token in (0, 1): a sigmoid around a learned bias.

    Args:
        num_heads: Heads of this rank.
        start: Value at initialisation.
        head_dim: Width of the input of a static gate; None if a memory adds its answer to the bias.
    """

    def __init__(self, num_heads: int, start: float, head_dim: int | None):
        super().__init__()
        shared = {"partition_dim": 0, "keep_fp32": True}
        spec = ParameterSpec(mean=math.log(start / (1 - start)), **shared)
        self.bias = new_parameter(num_heads, spec=spec)
        self.weight = None
        if head_dim is not None:
            spec = ParameterSpec(std=0.1 / head_dim**0.5, sizes=("head",), **shared)
            self.weight = new_parameter(num_heads, head_dim, spec=spec)

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs `[B, H, T, D]` to the gate's logits `[B, H, T]`, without what a memory adds."""
        bias = self.bias[:, None].expand(x.shape[:-1])
        return bias if self.weight is None else bias + (x * self.weight[:, None]).sum(-1)


STREAMS = ("k", "v", "q")


class Projections(NamedTuple):
    """What one chunk is written with: `q`, `k`, `v` `[B, H, C, D]`; `eta`, `alpha`, `mu` `[B, H, C]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    eta: Tensor
    alpha: Tensor
    mu: Tensor | None

    def split(self, sizes: list[int]) -> Iterator[Projections]:
        """Cut the tokens into parts of these sizes."""
        parts = (repeat(None) if x is None else x.split(sizes, dim=2) for x in self)
        return (Projections(*part) for _, *part in zip(sizes, *parts, strict=False))


class SelfModifying(nn.Module):
    """In-projection, short convolution, memories per head, RMSNorm per head, out-projection.

    The heads are split over tensor-parallel ranks; the recurrence communicates nothing.

    Args:
        d_model: Width of the residual stream.
        num_heads: Heads in all.
        head_dim: `D`.
        config: Switches and starting values.
        norm_eps: Added under the root of the RMSNorm.
        out_std: Standard deviation of the out-projection's initial weights.
        mesh: Where this process stands.
        recompute: Whether the backward pass computes every chunk again from the state it started with.
        reverse: Whether, with `recompute`, it computes most of these states again, too, from what chunks wrote.
        compiled: Whether a chunk is compiled (`torch.compile`), once for every number of tokens that is met.
        backend: What computes the chunks; as of `fused_chunks`, and of `delta_rule` where chunks have no loop.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        head_dim: int,
        config: SelfModifyingConfig,
        *,
        norm_eps: float,
        out_std: float,
        mesh: Mesh,
        recompute: bool = False,
        reverse: bool = False,
        compiled: bool = False,
        backend: Backend = "auto",
    ):
        super().__init__()
        self.has_loop, self.backend = has_chunk_loop(config), backend
        self.recompute, self.reverse, self.compiled = recompute, reverse, compiled
        self._step = torch.compile(self._advance, fullgraph=True, dynamic=False) if compiled else self._advance
        self.config, self.head_dim = config, head_dim
        self.heads = num_heads // mesh.tp_group.size()
        adaptive = set(config.adaptive)
        slices = len(STREAMS) + config.gate  # the output gate last
        self.in_proj = ColumnLinear(d_model, num_heads * head_dim * slices, std=d_model**-0.5, mesh=mesh)
        self.conv = None
        if config.conv_width:
            spec = ParameterSpec(std=config.conv_width**-0.5, partition_dim=0, keep_fp32=True)
            channels = self.heads * len(STREAMS) * head_dim
            self.conv = nn.ParameterDict({"weight": new_parameter(channels, config.conv_width, spec=spec)})
        self.gates = nn.ModuleDict(self._gates(adaptive))
        self.chunks = (config.chunk_size, config.projection_chunk_size or config.chunk_size)
        self.banks = nn.ModuleDict(self._banks(adaptive))
        self.spec = self._spec()
        self.norm = RMSNorm(self.heads, head_dim, eps=norm_eps, partition_dim=0)
        self.out_proj = RowLinear(num_heads * head_dim, d_model, std=out_std, mesh=mesh)

    def _gates(self, adaptive: set[str]) -> dict[str, Gate]:
        config, dim = self.config, self.head_dim
        gates = {"eta": Gate(self.heads, config.eta_init, None if "eta" in adaptive else dim)}
        if config.retention:
            gates["alpha"] = Gate(self.heads, config.alpha_init, None if "alpha" in adaptive else dim)
        if config.momentum:
            gates["mu"] = Gate(self.heads, config.mu_init, dim)
        return gates

    def _banks(self, adaptive: set[str]) -> dict[str, MemoryBank]:
        """One bank for all memories, or two if `mem` has boundaries of its own."""
        config = self.config
        vector_memories = tuple(name for name in "kv" if name in adaptive) + ("q",) * (config.query == "memory")
        gate_memories = tuple(name for name in ("eta", "alpha") if name in adaptive)
        spec = WriteSpec(config.targets, config.objective, config.inner_rule == "dgd", config.error_cap)
        hidden = (config.memory_dim or self.head_dim) if config.memory == "mlp" else None
        sizes = {"num_heads": self.heads, "head_dim": self.head_dim, "hidden": hidden, "spec": spec}
        if self.chunks[0] == self.chunks[1]:
            return {"memory": MemoryBank(("mem", *vector_memories), gate_memories, **sizes)}
        return {
            "memory": MemoryBank(("mem",), (), **sizes),
            "projection": MemoryBank(vector_memories, gate_memories, **sizes),
        }

    def _spec(self) -> MemorySpec:
        bank, config = self.banks["memory"], self.config
        learning = (bank.spec.objective, bank.spec.targets == "self", bank.spec.erase, bank.spec.error_cap, KEY_EPS)
        return MemorySpec(
            bank.vector_memories,
            bank.gate_memories,
            bank.hidden,
            self.chunks[0],
            *learning,
            config.eta_max,
            config.read,
        )

    def initial_state(self, batch: int) -> LayerState:
        """Return the learned initial state for `batch` sequences."""
        tensors = {}
        for name, bank in self.banks.items():
            tensors |= _pack(name, bank.initial_state(batch, self.config.momentum))
        if self.conv is not None:
            weight = self.conv["weight"]
            tensors["conv_tail"] = weight.new_zeros(weight.shape[1] - 1, batch, weight.shape[0]).transpose(0, 1)
        return LayerState(0, tensors)

    def forward(
        self, x: Tensor, state: LayerState | None = None, probe: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, LayerState]:
        """Mix tokens `x`, residual activations.

        Args:
            state: Where an earlier call ended; None begins at the learned initial state.
            probe: Filled with scalar means of this call (`eta_mean`, `alpha_mean`, `surprise`) if given.

        Returns:
            Residual activations and the state after the last token.
        """
        state = self.initial_state(x.shape[1]) if state is None else state
        streams, gate, tail = self._project(x, state.tensors.get("conv_tail"))
        carry = {name: tensor for name, tensor in state.tensors.items() if name != "conv_tail"}
        if (result := self._fused(state.position, streams, carry)) is not None:
            y, stats, carry = result
        elif self.has_loop:
            y, stats, carry = self._in_chunks(state.position, streams, carry)
        else:
            y, stats, carry = self._whole_sequence(streams, carry)
        y = self.norm(y.permute(2, 0, 1, 3)).to(x.dtype)  # [T, B, H, D]
        if gate is not None:
            y = y * F.silu(gate)
        if probe is not None:
            probe |= dict(zip(("eta_mean", "alpha_mean", "surprise"), stats.detach().mean((0, 1, 2)), strict=True))
        if tail is not None:
            carry = carry | {"conv_tail": tail.transpose(0, 1)}
        return self.out_proj(y.flatten(2)), LayerState(state.position + x.shape[0], carry)

    def _project(self, x: Tensor, tail: Tensor | None) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
        """Project and convolve: streams in fp32, the output gate `[T, B, H, D]`, the convolution's tail.

        Streams are `k`, `v`, `q` `[B, H, T, D]` and the logits of the gates `[B, H, T]`, as far as they are known
        before any memory is asked. Memories are asked at unit inputs only: inputs of any other length would let one
        that reads its own answers grow without bound. Each head's slices lie side by side in the in-projection, so
        that a rank holds whole heads.
        """
        mixed = self.in_proj(x).unflatten(-1, (self.heads, -1, self.head_dim))  # [T, B, H, S, D]
        gate = mixed[..., len(STREAMS), :] if self.config.gate else None
        weight = None
        if self.conv is not None:
            weight, tail = self.conv["weight"], tail.transpose(0, 1)
        unit = [name != "v" or self.config.targets != "value" for name in STREAMS]
        inputs, tail = head_streams(mixed[..., : len(STREAMS), :], weight, tail, unit, cpp=self.backend != "torch")
        streams = dict(zip(STREAMS, inputs, strict=True))
        return streams | {name: module(streams["k"]) for name, module in self.gates.items()}, gate, tail

    def _fused(
        self, position: int, streams: dict[str, Tensor], carry: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]] | None:
        """Do what `_in_chunks` does as one operation, where a model is trained and there is one for its memories."""
        in_loop = self.compiled or self.reverse or len(self.banks) > 1
        # Without a loop, kernels on a GPU run all chunks side by side.
        side_by_side = not self.has_loop and (streams["k"].is_cuda or self.backend == "triton")
        if in_loop or side_by_side or position % self.chunks[0] or not torch.is_grad_enabled():
            return None
        fused_streams, state = Streams(*(streams.get(name) for name in Streams._fields)), _unpack("memory", carry)
        run = fused_chunks(fused_streams, state.running, self.spec, self.backend)
        if run is None:
            return None
        out = run(fused_streams, state.running, state.momentum, self.spec)
        return out.y, out.stats, _pack("memory", BankState(out.running, out.momentum, out.boundary))

    def _whole_sequence(
        self, streams: dict[str, Tensor], carry: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Do what `_in_chunks` does for a linear memory that stores static values."""
        state = _unpack("memory", carry)
        inputs = self._make_qkv_and_gates(self.banks["memory"], state.boundary, streams)
        u = inputs.v if inputs.mu is None else inputs.v * (1 - inputs.mu)[..., None]
        tokens_first = (None if x is None else x.transpose(1, 2) for x in (inputs.k, u, inputs.eta, inputs.alpha))
        result = delta_rule(
            *tokens_first,
            state.running.w_in.mT,
            q=inputs.q.transpose(1, 2),
            mu=None if inputs.mu is None else inputs.mu.transpose(1, 2),
            momentum=None if state.momentum is None else state.momentum.w_in.mT,
            erase=self.config.inner_rule == "dgd",
            read=self.config.read,
            chunk_size=self.chunks[0],
            backend="torch" if self.backend == "cpp" else self.backend,
        )
        running = Weights(result.state.mT, None, None)
        momentum = None if result.momentum is None else Weights(result.momentum.mT, None, None)
        stats = torch.stack([inputs.eta, inputs.alpha, inputs.v.norm(dim=-1)], dim=-1)
        return result.output.transpose(1, 2), stats, _pack("memory", BankState(running, momentum, running))

    def _in_chunks(
        self, position: int, streams: dict[str, Tensor], carry: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Run the memories over the sequence: outputs `[B, H, T, D]`, what is probed, and what is carried on.

        Probed are eta, alpha and the norm of the main memory's error, `[B, H, T, 3]`.
        """
        sizes = _pieces(position, streams["k"].shape[2], self.chunks[1])
        offsets = [(position + end - size) % self.chunks[1] for end, size in zip(accumulate(sizes), sizes, strict=True)]

        # The step lasts as long as the graph, so it holds names and no tensors.
        stream_names, carry_names = tuple(streams), tuple(carry)

        def step(index: int, into: list[Tensor], parts: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Any]:
            banks = dict(zip(carry_names, into, strict=True))
            *outputs, banks, traces = self._step(offsets[index], dict(zip(stream_names, parts, strict=True)), banks)
            if index < len(sizes) - 1:
                banks = _at_boundary(banks)
            return outputs, [banks[name] for name in carry_names], traces

        def follow(into: list[Tensor], traces: dict[str, Trace]) -> list[Tensor]:
            banks = dict(zip(carry_names, into, strict=True))
            for name, trace in traces.items():
                banks |= _pack(name, trace.add(_unpack(name, banks)))
            banks = _at_boundary(banks)
            return [banks[name] for name in carry_names]

        computed = {"recompute": self.recompute, "replay": Replay(follow, REVERSE_PARTS) if self.reverse else None}
        (y, stats), after = scan(step, sizes, list(streams.values()), list(carry.values()), **computed)
        return y, stats, dict(zip(carry, after, strict=True))

    def _advance(
        self, offset: int, streams: dict[str, Tensor], carry: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], dict[str, Trace]]:
        """Do what `_in_chunks` does over a projection chunk, or a part of one that begins `offset` tokens into it.

        With `reverse`, the last result is what led each bank from the beginning to the end.
        """
        source = "projection" if "projection" in self.banks else "memory"
        banks = {name: _unpack(name, carry) for name in self.banks}
        if offset == 0:
            banks[source] = banks[source].at_boundary()
        inputs = self._make_qkv_and_gates(self.banks[source], banks[source].boundary, streams)
        outputs, surprises, traces = [], [], {}
        for part in inputs.split(_pieces(offset, inputs.k.shape[2], self.chunks[0])):
            if offset % self.chunks[0] == 0:
                banks["memory"] = banks["memory"].at_boundary()
            y, surprise, banks["memory"], traces["memory"] = self._move("memory", banks["memory"], part)
            outputs.append(y)
            surprises.append(surprise[:, :, 0])
            offset += part.k.shape[2]
        if source == "projection":
            _, _, banks[source], traces[source] = self._move(source, banks[source], inputs)
        if len(outputs) > 1:
            traces["memory"] = Trace.of_state(banks["memory"])
        y, surprise = (torch.cat(x, dim=2) if len(x) > 1 else x[0] for x in (outputs, surprises))
        stats = torch.stack([inputs.eta, inputs.alpha, surprise], dim=-1).detach()
        after: dict[str, Tensor] = {}
        for name, bank in banks.items():
            after |= _pack(name, bank)
        return y, stats, after, traces if self.reverse else {}

    def _make_qkv_and_gates(self, bank: MemoryBank, boundary: Weights, streams: dict[str, Tensor]) -> Projections:
        """Make keys, values, queries and gates, by memories where they are adaptive (Eq. 90)."""
        memory_inputs = {name: streams[name] for name in bank.vector_memories if name in streams}
        answers = bank.retrieve(boundary, memory_inputs, streams["k"])
        q, k, v = (l2_norm(answers[name]) if name in answers else streams[name] for name in ("q", "k", "v"))
        gates = {
            name: torch.sigmoid(streams[name] + answers[name] if name in answers else streams[name])
            for name in self.gates
        }
        eta = self.config.eta_max * gates["eta"]
        return Projections(q, k, v, eta, gates.get("alpha", torch.ones_like(eta)), gates.get("mu"))

    def _move(self, name: str, state: BankState, inputs: Projections) -> tuple[Tensor | None, Tensor, BankState, Trace]:
        """Move a bank over one of its chunks: answers to queries, norms of errors, the state after it, its trace."""
        bank = self.banks[name]
        decay = decay_weights(inputs.eta, inputs.alpha, inputs.mu)
        writes = bank.writes(state.boundary, inputs.k, inputs.v, inputs.mu)
        q = inputs.q if name == "memory" else None
        y, state, trace = bank.advance(state, writes, decay, q, self.config.read)
        return y, writes.surprise, state, trace


def _pieces(position: int, tokens: int, size: int) -> list[int]:
    """Cut `tokens` tokens that follow `position` others at multiples of `size`; return the sizes of the parts."""
    first = min(tokens, size - position % size)
    rest = tokens - first
    return [first, *[size] * (rest // size), *[rest % size] * (rest % size > 0)]


def _at_boundary(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Do what `BankState.at_boundary` does, to all banks."""
    return {name: tensors[name.replace("/boundary/", "/running/")] for name in tensors}


def _pack(name: str, state: BankState) -> dict[str, Tensor]:
    """Name a bank's tensors `bank/kind/layer`."""
    return {
        f"{name}/{kind}/{layer}": tensor
        for kind, weights in state._asdict().items()
        if weights is not None
        for layer, tensor in zip(LAYER_KEYS, weights, strict=True)
        if tensor is not None
    }


def _unpack(name: str, tensors: dict[str, Tensor]) -> BankState:
    """Undo `_pack`."""
    kinds = {}
    for kind in BankState._fields:
        parts = [tensors.get(f"{name}/{kind}/{layer}") for layer in LAYER_KEYS]
        kinds[kind] = None if parts[0] is None else Weights(*parts)
    return BankState(**kinds)
