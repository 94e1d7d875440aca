"""Hope's mixer: memories that learn while they read (Nested Learning, arXiv 2512.24695, Eq. 83-93).

What the memories have learned so far is the cache: it has the same size after ten tokens or a million.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .token_hope import Token, TokenLayer

KEY_EPS = 1e-2  # of hopescale's memories: keeps the direction of an erased memory's answer from being amplified

State = dict[str, Tensor]
Mix = Callable[[Tensor, State, Tensor], tuple[Tensor, State]]


class Columns(NamedTuple):
    """The columns of one call.

    Attributes:
        real: `[B, past + T]`, tokens among all columns.
        position: `[B]`, tokens of each row before this call.
        groups: Rows that run through a recurrence together, and the columns of this call that are their tokens.
    """

    real: Tensor
    position: Tensor
    groups: list[tuple[Tensor, slice]]


class Norm(nn.Module):
    """RMSNorm over the last dimension, in float32, times a constant."""

    def __init__(self, *shape: int, eps: float, multiplier: float = 1.0):
        super().__init__()
        self.weight, self.eps, self.multiplier = nn.Parameter(torch.ones(shape)), eps, multiplier

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[..., *shape]`; returns the type of `x`."""
        wide, weight = x.float(), self.weight if self.multiplier == 1 else self.weight * self.multiplier
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * weight).to(x.dtype)


def mix_groups(run: Mix, x: Tensor, state: State, columns: Columns, width: int | None = None) -> tuple[Tensor, State]:
    """Run a recurrence over the tokens of each group of rows: `run(x, state, position)` knows of no padding.

    Padding in `x` `[B, T, N]` gives zeros, and moves no state. Answers are `[B, T, width]`; None is the width of `x`.
    """
    if len(columns.groups) == 1 and columns.groups[0][0].numel() == x.shape[0]:
        rows, span = columns.groups[0]
        y, state = run(x[:, span], state, columns.position)
        return F.pad(y, (0, 0, span.start, x.shape[1] - span.stop)), state
    mixed, state = None, {name: tensor.clone() for name, tensor in state.items()}
    shape = (*x.shape[:2], width or x.shape[2])
    for rows, span in columns.groups:
        part = {name: tensor[rows] for name, tensor in state.items()}
        y, part = run(x[rows, span], part, columns.position[rows])
        mixed = y.new_zeros(shape) if mixed is None else mixed  # autocast decides the dtype of `y`
        mixed[rows, span] = y
        for name, tensor in part.items():
            state[name][rows] = tensor.to(state[name].dtype)
    return x.new_zeros(shape) if mixed is None else mixed, state


def as_written(x: Tensor) -> torch.autocast:
    """Return a context in which autocast does not lower the precision of results of `x`, as memories need it."""
    return torch.autocast(x.device.type, enabled=False)


def to_unit(x: Tensor) -> Tensor:
    """Scale vectors to unit length."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class Tables(NamedTuple):
    """Weights of the parts of a state after each token of a chunk: `[B, H, C]`, and `[B, H, C, C]` by writing token."""

    start: Tensor
    push: Tensor | None
    write: Tensor
    erase: Tensor
    last_push: Tensor | None
    momentum_decay: Tensor | None

    def before(self) -> Tables:
        """Return the same for the state before each token's own write."""

        def down(table: Tensor, first: float, dim: int) -> Tensor:
            head = torch.full_like(table.narrow(dim, 0, 1), first)
            return torch.cat([head, table.narrow(dim, 0, table.shape[dim] - 1)], dim=dim)

        push = None if self.push is None else down(self.push, 0.0, -1)
        parts = {"write": down(self.write, 0.0, -2), "erase": down(self.erase, 0.0, -2)}
        return self._replace(start=down(self.start, 1.0, -1), push=push, **parts)


def _log(gate: Tensor) -> Tensor:
    return gate.clamp_min(torch.finfo(gate.dtype).tiny).log()


def _ratios(log_gate: Tensor) -> Tensor:
    """Return at `(t, s)` the product of a gate from `s + 1` to `t`; 0 above the diagonal."""
    size = log_gate.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=log_gate.device).tril()
    steps = log_gate[..., None].expand(*log_gate.shape, size).masked_fill(~lower.tril(-1), 0.0)
    return steps.cumsum(-2).exp().masked_fill(~lower, 0.0)


def _tables(eta: Tensor, alpha: Tensor, mu: Tensor | None) -> Tables:
    kept, start = _ratios(_log(alpha)), _log(alpha).cumsum(-1).exp()
    erase = kept * eta[..., None, :]
    if mu is None:
        return Tables(start, None, erase, erase, None, None)
    chain, from_start = _ratios(_log(mu)) * eta[..., None, :], _log(mu).cumsum(-1).exp()
    push = (kept @ from_start[..., None])[..., 0]
    return Tables(start, push, kept @ chain, erase, chain[..., -1, :], from_start[..., -1])


class Layer:
    """One matrix of a memory during one chunk: `S_t = alpha_t S_{t-1} - eta_t S_{t-1} k_t k_t^T + Z_t`.

    Args:
        tables: Tables of the chunk's gates.
        keys: `[B, H, C, D]`.
        values: Values that each token writes, `[B, H, C, Do]`.
        state: `S` before the chunk, `[B, H, Do, D]`.
        momentum: `Z` before the chunk; None without momentum.
        erase: Whether a write erases what its key held.
    """

    def __init__(
        self, tables: Tables, keys: Tensor, values: Tensor, state: Tensor, momentum: Tensor | None, erase: bool
    ):
        self.tables, self.keys, self.values = tables, keys, values
        self.state, self.momentum, self.held = state, momentum, None
        if erase:
            before = tables.before()
            right = self.read(before, keys)
            self.held = torch.linalg.solve_triangular(
                before.erase * (keys @ keys.mT), right, upper=False, unitriangular=True
            )

    def read(self, tables: Tables, q: Tensor) -> Tensor:
        """Read the state that `tables` describe, with one query per token."""
        similar = q @ self.keys.mT
        output = tables.start[..., None] * (q @ self.state.mT) + (tables.write * similar) @ self.values
        if self.momentum is not None:
            output = output + tables.push[..., None] * (q @ self.momentum.mT)
        return output if self.held is None else output - (tables.erase * similar) @ self.held

    def after(self) -> tuple[Tensor, Tensor | None]:
        """Return state and momentum after the chunk."""
        last = self.tables
        values = last.write[..., -1, :, None] * self.values
        if self.held is not None:
            values = values - last.erase[..., -1, :, None] * self.held
        state = last.start[..., -1, None, None] * self.state + values.mT @ self.keys
        if self.momentum is None:
            return state, None
        pushes = (last.last_push[..., None] * self.values).mT @ self.keys
        state = state + last.push[..., -1, None, None] * self.momentum
        return state, last.momentum_decay[..., None, None] * self.momentum + pushes


class Memory(nn.Module):
    """An associative memory per head: `W z`, or an MLP `z + W1 silu(W2 z)` (without `z` if it answers with a number).

    Its parameters are the state before the first token.
    """

    def __init__(self, heads: int, dim: int, size_out: int, hidden: int | None, normalize: bool):
        super().__init__()
        self.residual, self.normalize = size_out == dim, normalize
        shapes = {"w": (size_out, dim)} if hidden is None else {"w2": (hidden, dim), "w1": (size_out, hidden)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(heads, *shape)))

    def retrieve(self, weights: State, x: Tensor) -> Tensor:
        """Answer `x` `[B, H, C, D]` with fixed weights."""
        if "w" in weights:
            return x @ weights["w"].mT
        answer = F.silu(x @ weights["w2"].mT) @ weights["w1"].mT
        return x + answer if self.residual else answer

    def writes(self, weights: State, k: Tensor, error: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return key and value of each token's write into each matrix, given the gradient of the answers."""
        if "w" in weights:
            return {"w": (k, -error)}
        inner = k @ weights["w2"].mT
        gate = torch.sigmoid(inner)
        hidden = inner * gate
        slope = gate + hidden * (1 - gate)
        length = torch.sqrt(hidden.square().sum(-1, keepdim=True) + KEY_EPS)
        first, written = -(error @ weights["w1"]) * slope, length
        if self.normalize:  # divided by squares of what errors are amplified by, above 1
            gain = first.square().sum(-1, keepdim=True) / error.square().sum(-1, keepdim=True).clamp_min(1e-30)
            first, written = first / gain.clamp_min(1), torch.minimum(length, 1 / length)
        return {"w2": (k, first), "w1": (hidden / length, -written * error)}


class HopeGate(nn.Module):
    """A number per head and token in (0, 1)."""

    def __init__(self, heads: int, dim: int | None):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(heads))
        self.weight = None if dim is None else nn.Parameter(torch.zeros(heads, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Open the gate: `x` is a memory's answer `[B, H, C, 1]`, or the input `[B, H, C, D]` of a static gate."""
        logit = x[..., 0] if self.weight is None else (x * self.weight[:, None]).sum(-1)
        return torch.sigmoid(logit + self.bias[:, None])


class HopeSelfModifying(nn.Module):
    """Hope's mixer: memories that make keys, values and gates for themselves, chunk by chunk."""

    def __init__(self, model: SimpleNamespace, config: SimpleNamespace, dim: int, *, is_whole: bool = True):
        super().__init__()
        heads = model.num_heads
        self.config, self.heads, self.dim = config, heads, dim
        self.in_proj = nn.Linear(model.d_model, heads * dim * (3 + config.gate), bias=False)
        self.conv = None
        if config.conv_width:
            self.conv = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(heads * 3 * dim, config.conv_width))})
        adaptive = set(config.adaptive)
        gates = ["eta"] + ["alpha"] * config.retention + ["mu"] * config.momentum
        self.gates = nn.ModuleDict({name: HopeGate(heads, None if name in adaptive else dim) for name in gates})
        hidden = (config.memory_dim or dim) if config.memory == "mlp" else None
        names = [*(name for name in "kv" if name in adaptive), *["q"] * (config.query == "memory")]
        sizes = dict.fromkeys(["mem", *names], dim) | {name: 1 for name in ("eta", "alpha") if name in adaptive}
        normalize = config.memory == "mlp" if config.normalize_writes is None else config.normalize_writes
        self.memories = {name: Memory(heads, dim, size, hidden, normalize) for name, size in sizes.items()}
        projections = config.projection_chunk_size or config.chunk_size
        self.period = dict.fromkeys(sizes, projections) | {"mem": config.chunk_size}
        split = projections != config.chunk_size
        banks = {name: "projection" if split and name != "mem" else "memory" for name in sizes}
        self.banks = nn.ModuleDict({bank: nn.ModuleDict() for bank in dict.fromkeys(banks.values())})
        for name, bank in banks.items():
            self.banks[bank][name] = self.memories[name]
        if config.far is not None:
            self.memories["far"], self.period["far"] = Memory(heads, dim, dim, hidden, normalize), config.far.chunk_size
            self.banks["far"] = nn.ModuleDict({"mem": self.memories["far"]})
            gates = ["far_eta"] + ["far_alpha"] * config.retention
            self.gates.update({name: HopeGate(heads, dim) for name in gates})
        self.norm = Norm(heads, dim, eps=model.norm_eps)
        if is_whole:
            self.out_proj = nn.Linear(heads * dim, model.d_model, bias=False)

    def initial_state(self, batch: int) -> State:
        """Return weights, momenta and boundary weights of all memories, and the tail of the convolution."""
        state = {}
        for name, memory in self.memories.items():
            for matrix, weight in memory.named_parameters():
                weights = weight.float().expand(batch, *weight.shape)
                state |= {f"{name}/{matrix}": weights, f"boundary/{name}/{matrix}": weights}
                if self.config.momentum and name != "far":
                    state[f"momentum/{name}/{matrix}"] = torch.zeros_like(weights)
        if self.conv is not None:
            weight = self.conv["weight"]
            state["tail"] = weight.new_zeros(batch, weight.shape[1] - 1, weight.shape[0])
        return state

    def forward(self, x: Tensor, state: State, columns: Columns) -> tuple[Tensor, State]:
        """Mix `[B, T, N]`; padding neither moves a memory nor counts as a token."""
        return mix_groups(self._run, x, state or self.initial_state(x.shape[0]), columns)

    def _reset(self, state: State, position: Tensor) -> None:
        """Start memories anew in the rows that stand where a piece of `reset_every` tokens begins."""
        if self.config.reset_every is None:
            return
        begins = position % self.config.reset_every == 0
        if not begins.any():
            return
        for name, initial in self.initial_state(len(position)).items():
            if name != "tail" and "far/" not in name:
                state[name] = torch.where(begins.view(-1, *[1] * (initial.dim() - 1)), initial, state[name])

    def _run(self, x: Tensor, state: State, position: Tensor) -> tuple[Tensor, State]:
        y, state = self.answer(x, state, position)
        return self.out_proj(y), state

    def answer(self, x: Tensor, state: State, position: Tensor) -> tuple[Tensor, State]:
        """Mix tokens without padding, and without the map out: `[B, T, H * D]`.

        Of more than one token, all rows stand at the same place of a chunk.
        """
        mixed = self.in_proj(x).unflatten(-1, (self.heads, -1, self.dim))  # [B, T, H, P, D]
        gate, mixed = mixed[..., 3:, :], mixed[..., :3, :].flatten(2)
        state = dict(state)
        if self.conv is not None:
            weight = self.conv["weight"].to(x.dtype)
            padded = torch.cat([state["tail"].to(x.dtype), mixed], dim=1)
            state["tail"] = padded[:, x.shape[1] :]
            if x.shape[1] == 1:
                mixed = F.silu((padded.float() * weight.mT.float()).sum(1, keepdim=True).to(x.dtype))
            else:
                mixed = F.silu(F.conv1d(padded.mT, weight[:, None], groups=weight.shape[0])).mT
        streams = mixed.float().unflatten(-1, (self.heads, 3, self.dim)).permute(3, 0, 2, 1, 4)  # [P, B, H, T, D]
        outputs, read, size = [], 0, self.config.chunk_size
        while read < x.shape[1]:
            stop = min(x.shape[1], read + size - int(position[0] + read) % size)
            self._reset(state, position + read)
            with as_written(x):
                y = self._chunk(streams[:, :, :, read:stop], state, position + read)
            outputs.append(y)
            read = stop
        y = self.norm(torch.cat(outputs, dim=2).transpose(1, 2)).to(x.dtype)  # [B, T, H, D]
        y = y * F.silu(gate[..., 0, :]) if self.config.gate else y
        return y.flatten(2), state

    def weights(self, state: State, kind: str, name: str) -> State:
        """Return the matrices of a memory: those it has now, or of a kind such as `boundary/`."""
        return {matrix: state[f"{kind}{name}/{matrix}"] for matrix, _ in self.memories[name].named_parameters()}

    def _chunk(self, streams: Tensor, state: State, position: Tensor) -> Tensor:
        """Move all memories over a chunk or a part of one, in `state`; return what its queries read `[B, H, C, D]`."""
        config, boundary = self.config, {}
        begins = {period: position % period == 0 for period in set(self.period.values())}
        opening = {period for period, rows in begins.items() if rows.any()}
        for name, period in self.period.items():
            for matrix, running in self.weights(state, "", name).items() if period in opening else ():
                key = f"boundary/{name}/{matrix}"
                state[key] = torch.where(begins[period][:, None, None, None], running, state[key])
            boundary[name] = self.weights(state, "boundary/", name)
        unit = dict(zip("kvq", to_unit(streams), strict=True))
        near = {name: memory for name, memory in self.memories.items() if name != "far"}
        asked = {name: memory.retrieve(boundary[name], unit.get(name, unit["k"])) for name, memory in near.items()}
        gates = {name: gate(asked.get(name, unit["k"])) for name, gate in self.gates.items()}
        eta, mu = config.eta_max * gates["eta"], gates.get("mu")
        alpha = gates["alpha"] if config.retention else torch.ones_like(eta)
        q, k = (to_unit(asked[name]) if name in asked else unit[name] for name in "qk")
        v = asked.get("v", streams[1])
        v = to_unit(v) if config.targets == "self" else v
        single = streams.shape[3] == 1
        tables, kind = (Token(eta, alpha, mu), TokenLayer) if single else (_tables(eta, alpha, mu), Layer)
        output = self.memories["mem"].retrieve(boundary["mem"], q)
        for name, memory in near.items():
            error = self._error(memory, boundary[name], k, v)
            if mu is not None and config.momentum_write == "averaged":
                error = error * (1 - mu)[..., None]
            layers = {}
            for matrix, (key, value) in memory.writes(boundary[name], k, error).items():
                place = f"{name}/{matrix}"
                momentum = state.get(f"momentum/{place}")
                layers[matrix] = kind(tables, key, value, state[place], momentum, config.inner_rule == "dgd")
                state[place], momentum = layers[matrix].after()
                if momentum is not None:
                    state[f"momentum/{place}"] = momentum
            if name == "mem" and config.read != "boundary":
                reading = tables.before() if config.read == "prefix" else tables
                first, *second = (layers[matrix] for matrix in ("w", "w2", "w1") if matrix in layers)
                inner = first.read(reading, q)
                output = q + second[0].read(reading, F.silu(inner)) if second else inner
        if config.far is not None:
            v = unit["v"] if config.targets == "self" else streams[1]
            output = output + self._far(boundary["far"], state, unit["q"], unit["k"], v, gates)
        return output

    def _far(self, boundary: State, state: State, q: Tensor, k: Tensor, v: Tensor, gates: State) -> Tensor:
        """Write the far memory by gradient descent, in `state`; return its answers to the queries before the write."""
        memory, eta = self.memories["far"], self.config.eta_max * gates["far_eta"]
        tables = _tables(eta, gates.get("far_alpha", torch.ones_like(eta)), None)
        error = self._error(memory, boundary, k, v)
        for matrix, (key, value) in memory.writes(boundary, k, error).items():
            state[f"far/{matrix}"], _ = Layer(tables, key, value, state[f"far/{matrix}"], None, False).after()
        return memory.retrieve(boundary, q)

    def _error(self, memory: Memory, weights: State, k: Tensor, v: Tensor) -> Tensor:
        """Return the gradient of the inner loss with respect to a memory's answers."""
        if self.config.targets == "self":
            answer, target = memory.retrieve(weights, torch.cat([k, v], dim=2)).chunk(2, dim=2)
        else:
            answer, target = memory.retrieve(weights, k), v
        if self.config.objective == "dot":
            return -target
        error = answer - target
        if self.config.error_cap is None:
            return error
        scale = self.config.error_cap * torch.rsqrt(error.square().sum(-1, keepdim=True) + 1e-12)
        return error * scale.clamp_max(1.0)
