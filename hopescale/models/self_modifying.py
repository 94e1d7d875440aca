"""Self-modifying Titans (Nested Learning, arXiv 2512.24695, Eq. 83-91): the mixer of Hope."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hopescale.config.model_shape import head_dim, memory_dim, normalizes_writes
from hopescale.config.schema import FarMemoryConfig, ModelConfig, SelfModifyingConfig
from hopescale.models.ahead import Ahead
from hopescale.models.memory import MemoryBank
from hopescale.models.norm import RMSNorm
from hopescale.models.state import LayerState
from hopescale.models.statistics import statistics_of
from hopescale.ops.backends import Backend, KernelPrecision, Recompute, choose_products, select_streams
from hopescale.ops.device import device_type, dtype_name
from hopescale.ops.documents import Documents
from hopescale.ops.fused import is_fused
from hopescale.ops.head_streams import head_streams
from hopescale.ops.self_modifying import (
    KEY_EPS,
    GateWeights,
    Memories,
    MemorySpec,
    MemoryStart,
    MemoryState,
    SelfModifyingOutput,
    Streams,
    can_mix,
    mix_heads,
    run_piece,
    run_with_resets,
    self_modifying,
)
from hopescale.parallel.layers import ColumnLinear, ParameterSpec, RowLinear, new_parameter
from hopescale.parallel.mesh import Mesh

STREAMS = ("k", "v", "q")


class MixerState(NamedTuple):
    """State of the mixer: the memories, as in `Memories`, and the convolution's last inputs.

    Attributes:
        memory: Bank of the memory called `mem`.
        projection: Bank of the others; None if they lie in the same one.
        far: Memory that never starts anew; None without `far`.
        conv_tail: Projected inputs of the last tokens `[B, W - 1, channels]`; None without a convolution.
        ahead: Tokens of chunks that are not at their end, after a piece of documents; else None.
    """

    memory: MemoryState
    projection: MemoryState | None
    far: MemoryState | None
    conv_tail: Tensor | None
    ahead: Ahead | None = None


def far_spec(spec: MemorySpec, far: FarMemoryConfig) -> MemorySpec:
    """Return the spec of a mixer's far memory, from its other memories (TNT, arXiv 2511.07343, Eq. 5 and 7)."""
    pace = {"chunk_size": far.chunk_size, "projection_chunk_size": None}
    rule = {"erase": False, "read": "boundary"}
    return replace(spec, vector_memories=spec.vector_memories[:1], gate_memories=(), **pace, **rule)


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
        """Map inputs `[B, H, T, D]` to the gate's logits `[B, H, T]`, without the addition of a memory."""
        bias = self.bias[:, None].expand(x.shape[:-1])
        return bias if self.weight is None else bias + (x * self.weight[:, None]).sum(-1)


class SelfModifying(nn.Module):
    """In-projection, short convolution, memories per head, RMSNorm per head, out-projection.

    The heads are split over tensor-parallel ranks; the recurrence communicates nothing.

    Args:
        model: Sizes.
        mixer: Switches and starting values.
        out_std: Standard deviation of the out-projection's initial weights. None makes a part of another mixer:
            `answer` then gets all tokens on every rank, and nothing is projected out.
        mesh: Ranks of the run, and this process among them.
        recompute, compiled, backend: Arguments of `ops.self_modifying`.
        kernel_precision: Operands of products in Triton kernels; `auto` goes by the type of the weights.
    """

    def __init__(
        self,
        model: ModelConfig,
        mixer: SelfModifyingConfig,
        *,
        out_std: float | None,
        mesh: Mesh,
        recompute: Recompute = "none",
        compiled: bool = False,
        backend: Backend = "auto",
        kernel_precision: KernelPrecision = "auto",
    ):
        super().__init__()
        self.computed = {"recompute": recompute, "compiled": compiled, "backend": backend}
        self.kernel_precision = kernel_precision
        config, dim = mixer, head_dim(model)
        self.config, self.head_dim = config, dim
        self.heads, width = model.num_heads // mesh.tp_group.size(), model.num_heads * dim
        adaptive = set(config.adaptive)
        slices = len(STREAMS) + config.gate  # the output gate last
        how = {"std": model.d_model**-0.5, "shared_input": out_std is None, "parts": ((1, dim),) * slices}
        self.in_proj = ColumnLinear(model.d_model, width * slices, mesh=mesh, **how)
        self.conv = None
        if config.conv_width:
            spec = ParameterSpec(std=config.conv_width**-0.5, partition_dim=0, keep_fp32=True)
            channels = self.heads * len(STREAMS) * dim
            self.conv = nn.ParameterDict({"weight": new_parameter(channels, config.conv_width, spec=spec)})
        self.gates = nn.ModuleDict(self._gates(adaptive))
        self.spec = self._memory_spec(adaptive, memory_dim(model, mixer))
        self.far_spec = None if config.far is None else far_spec(self.spec, config.far)
        names = zip((*Memories._fields, "far"), (*self.spec.banks, self.far_spec), strict=True)
        self.banks = nn.ModuleDict({name: MemoryBank(bank, self.heads, dim) for name, bank in names if bank})
        self.norm = RMSNorm(self.heads, dim, eps=model.norm_eps, partition_dim=0)
        if out_std is not None:
            self.out_proj = RowLinear(width, model.d_model, std=out_std, mesh=mesh)

    def _gates(self, adaptive: set[str]) -> dict[str, Gate]:
        config, dim = self.config, self.head_dim
        gates = {"eta": Gate(self.heads, config.eta_init, None if "eta" in adaptive else dim)}
        if config.retention:
            gates["alpha"] = Gate(self.heads, config.alpha_init, None if "alpha" in adaptive else dim)
        if config.momentum:
            gates["mu"] = Gate(self.heads, config.mu_init, dim)
        if config.far is not None:
            gates["far_eta"] = Gate(self.heads, config.far.eta_init, dim)
            if config.retention:
                gates["far_alpha"] = Gate(self.heads, config.far.alpha_init, dim)
        return gates

    def _memory_spec(self, adaptive: set[str], hidden: int | None) -> MemorySpec:
        config = self.config
        makers = tuple(name for name in "kv" if name in adaptive) + ("q",) * (config.query == "memory")
        return MemorySpec(
            vector_memories=("mem", *makers),
            gate_memories=tuple(name for name in ("eta", "alpha") if name in adaptive),
            hidden=hidden,
            chunk_size=config.chunk_size,
            objective=config.objective,
            own_target=config.targets == "self",
            erase=config.inner_rule == "dgd",
            error_cap=config.error_cap,
            key_eps=KEY_EPS,
            eta_max=config.eta_max,
            read=config.read,
            projection_chunk_size=config.projection_chunk_size,
            momentum_write=config.momentum_write,
            normalize_writes=normalizes_writes(config),
        )

    def initial_state(self, batch: int, *, unfinished: bool = False) -> LayerState:
        """Return the learned initial state for `batch` sequences, `unfinished` like one after a piece of documents."""
        tail, ahead = self._initial_tail(batch), self._initial_ahead(batch) if unfinished else None
        return LayerState(0, MixerState(*self._initial_memories(batch), self._initial_far(batch), tail, ahead))

    def _initial_ahead(self, batch: int) -> Ahead:
        like = self.in_proj.weight
        kind = torch.promote_types(like.dtype, torch.float32)
        sizes = (spec.chunk_size for spec in (*self.spec.banks, self.far_spec) if spec is not None)
        empty = like.new_zeros(batch, self.heads, max(sizes) - 1, self.head_dim, dtype=kind)
        return Ahead(empty, empty)

    def _initial_tail(self, batch: int) -> Tensor | None:
        if self.conv is None:
            return None
        weight = self.conv["weight"]
        return weight.new_zeros(weight.shape[1] - 1, batch, weight.shape[0]).transpose(0, 1)

    def _start(self, batch: int) -> Memories | MemoryStart:
        """Return the learned initial weights, laid out for `batch` sequences where memories lie in two banks."""
        if "projection" in self.banks:
            return self._initial_memories(batch)
        return self.banks["memory"].start(self.config.momentum)

    def _initial_memories(self, batch: int) -> Memories:
        states = (
            self.banks[name].initial_state(batch, self.config.momentum) if name in self.banks else None
            for name in Memories._fields
        )
        return Memories(*states)

    def _initial_far(self, batch: int) -> MemoryState | None:
        return self.banks["far"].initial_state(batch, momentum=False) if "far" in self.banks else None

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
                memories, momenta, the convolution's tail and the grid of chunks begin anew. None takes a sequence for
                one document.
            probe: Dict to be filled with scalar means of this call, `eta_mean`, `alpha_mean`, `surprise`, and with
                `state_norm`, the largest norm that memories end with. `tokens` holds the values that the means are of,
                one row per head and token.

        Returns:
            Residual activations and the state after the last token. After several documents, its tensors are those
            after the last document of each sequence; its position counts all tokens, and later chunks begin where that
            says. After a piece, its memories are those after the last whole chunk of that document.

        Raises:
            ValueError: If documents are not those of the tokens, or go on from earlier tokens without their state, or
                the reverse.
        """
        y, state = self.answer(x, state, documents, probe)
        return self.out_proj(y.flatten(2)), state

    def answer(
        self,
        x: Tensor,
        state: LayerState | None = None,
        documents: Documents | None = None,
        probe: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, LayerState]:
        """Mix tokens as `forward` does, without the output projection: answers of this rank's heads `[T, B, H, D]`."""
        batch = x.shape[1]
        position, memories, far, tail, ahead = 0, None, None, None, None
        if state is not None:
            position, (*memories, far, tail, ahead) = state
            memories = Memories(*memories)
        elif self.far_spec is not None:
            far = self._initial_far(batch)
        mixed = self.in_proj(x).unflatten(-1, (self.heads, -1, self.head_dim))  # [T, B, H, P, D]
        plain = documents is None and probe is None and far is None
        if plain and can_mix(mixed, self.spec, self.computed["backend"]):
            begun = self.begun(memories, position, len(mixed), batch)
            if begun is not None:
                y, state = self._mix(mixed, self._initial_tail(batch) if state is None else tail, *begun)
                return y, LayerState(position + len(y), state)
        streams, gate, tail = self._project(mixed, tail, documents, position)
        if documents is not None and documents.begun is not None:
            ahead = ahead or self._initial_ahead(batch)
            streams = ahead.before(streams, self.gates)
            ahead = ahead.after(streams)
        y, stats, memories = self._remember(streams, memories, position, documents)
        if far is not None:
            answers, _, (far, _) = self._remember_far(streams, far, position, documents)
            y = y + answers
        y = self._out(y, gate, x.dtype)
        if probe is not None:
            probe |= statistics_of(stats, [_largest_norm(memories)])
        return y, LayerState(position + len(y), MixerState(*memories, far, tail, ahead))

    def _out(self, y: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Scale and gate the answers of heads `[B, H, T, D]`: `[T, B, H, D]` of a type."""
        if y.dtype != torch.float64 and is_fused(self.computed["backend"], y, self.head_dim):
            from hopescale.ops.fused.answers import gated_answers

            return gated_answers(y, gate, self.norm.weight, self.norm.eps, dtype)
        y = self.norm(y.permute(2, 0, 1, 3)).to(dtype)
        return y if gate is None else y * F.silu(gate)

    def begun(self, memories: Memories | None, position: int, tokens: int, batch: int) -> tuple[Memories, int] | None:
        """Return the memories before tokens of one piece, and its tokens before them; None for tokens of several."""
        every = self.config.reset_every
        place = position if every is None else position % every
        if every is not None and place + tokens > every:
            return None
        fresh = memories is None or (every and place == 0)
        return (self._initial_memories(batch) if fresh else memories), place

    def _mix(self, mixed: Tensor, tail: Tensor | None, memories: Memories, position: int) -> tuple[Tensor, MixerState]:
        """Compute answers of heads `[T, B, H, D]` and the next state from projected inputs, in one operation."""
        filters = None
        if self.conv is not None:
            filters, tail = self.conv["weight"], tail.transpose(0, 1)
        unit = [name != "v" or self.config.targets != "value" for name in STREAMS]
        modules = self.gates._modules  # torch's own look-ups take longer than a token's gates
        weights = [modules[name]._parameters if name in modules else None for name in ("eta", "alpha", "mu")]
        gates = tuple(own and GateWeights(own["bias"], own.get("weight")) for own in weights)
        norm, inputs = (self.norm.weight, self.norm.eps), mixed[..., : len(STREAMS), :]
        y, memories, tail = mix_heads(inputs, filters, tail, unit, gates, *norm, memories, self.spec, position=position)
        if self.config.gate:
            y = y * F.silu(mixed[..., len(STREAMS), :])
        return y, MixerState(*memories, None, None if tail is None else tail.transpose(0, 1))

    def _how(self) -> dict[str, Any]:
        """Say how memories are computed, as `ops.self_modifying` takes it."""
        products = choose_products(self.kernel_precision, dtype_name(self.in_proj.weight.dtype))
        return self.computed | {"products": products}

    def _remember(
        self, streams: Streams, memories: Memories | None, position: int, documents: Documents | None
    ) -> SelfModifyingOutput:
        """Run the memories, from their initial state where there is none, a document begins, or they start anew."""
        run, every = partial(self_modifying, spec=self.spec, **self._how()), self.config.reset_every
        if documents is not None:
            documents = documents if every is None else documents.cut(every)
            if documents.begun is not None:
                size = self.spec.projection_chunk_size or self.spec.chunk_size
                return run_piece(run, streams, memories, self._start(1), documents, size)
            return run(streams, self._start(1), documents=documents)
        batch = len(streams.k)
        if every is not None:
            memories, fresh = memories or self._initial_memories(batch), self._initial_memories(1)
            return run_with_resets(run, streams, memories, fresh, every=every, position=position)
        return run(streams, memories or self._start(batch), position=position)

    def _remember_far(
        self, streams: Streams, memory: MemoryState, position: int, documents: Documents | None
    ) -> SelfModifyingOutput:
        """Run the far memory, from its initial state where a document begins."""
        eta, alpha = (self.gates[name](streams.k) if name in self.gates else None for name in ("far_eta", "far_alpha"))
        own, memories = streams._replace(eta=eta, alpha=alpha, mu=None), Memories(memory, None)
        run = partial(self_modifying, spec=self.far_spec, **self._how())
        if documents is None:
            return run(own, memories, position=position)
        fresh = Memories(self._initial_far(1), None)
        if documents.begun is None:
            return run(own, fresh, documents=documents)
        return run_piece(run, own, memories, fresh, documents, self.far_spec.chunk_size)

    def _project(
        self, mixed: Tensor, tail: Tensor | None, documents: Documents | None, position: int
    ) -> tuple[Streams, Tensor | None, Tensor | None]:
        """Convolve projected inputs: streams in fp32, the output gate `[T, B, H, D]`, the convolution's tail.

        Memories are read at unit inputs only: inputs of any other length would let one that reads its own answers grow
        without bound. Each head's slices lie side by side in the in-projection, so that a rank holds whole heads.
        """
        gate = mixed[..., len(STREAMS), :] if self.config.gate else None
        first = None if documents is None else documents.first_of(mixed.shape[1], mixed.shape[0], position)
        weight = None
        if self.conv is not None:
            weight, tail = self.conv["weight"], None if tail is None else tail.transpose(0, 1)
        unit = [name != "v" or self.config.targets != "value" for name in STREAMS]
        carries = tail is not None and tail.requires_grad
        if not carries and is_fused(self.computed["backend"], mixed, self.head_dim):
            return self._project_fused(mixed, weight, tail, unit, first)
        code = select_streams(
            self.computed["backend"], self.head_dim, device_type(mixed.device), dtype_name(mixed.dtype)
        )
        if weight is not None and tail is None:
            tail = self._initial_tail(mixed.shape[1]).transpose(0, 1)
        (k, v, q), tail = head_streams(mixed[..., : len(STREAMS), :], weight, tail, unit, first=first, backend=code)
        gates = (self.gates[name](k) if name in self.gates else None for name in ("eta", "alpha", "mu"))
        return Streams(k, v, q, *gates), gate, None if tail is None else tail.transpose(0, 1)

    def _project_fused(
        self, mixed: Tensor, weight: Tensor | None, tail: Tensor | None, unit: list[bool], first: Tensor | None
    ) -> tuple[Streams, Tensor | None, Tensor | None]:
        from hopescale.ops.fused.streams import head_streams_and_gates

        gates = {name: self.gates[name] for name in ("eta", "alpha", "mu") if name in self.gates}
        numbers = [(gate.weight, gate.bias) for gate in gates.values()]
        streams, logits, rest, tail = head_streams_and_gates(mixed, weight, tail, unit, numbers, first=first)
        found = dict(zip(gates, logits, strict=True))
        given = Streams(*streams, *(found.get(name) for name in ("eta", "alpha", "mu")))
        gate = rest[..., 0, :] if self.config.gate else None
        return given, gate, None if tail is None else tail.transpose(0, 1)


@torch.no_grad()
def _largest_norm(memories: Memories) -> Tensor:
    """Return the largest norm of a head's matrices that read keys, or of a second layer, over banks and sequences."""
    matrices = [part for bank in memories if bank is not None for part in bank.running if part is not None]
    return torch.stack([torch.linalg.matrix_norm(matrix).max() for matrix in matrices]).max()
