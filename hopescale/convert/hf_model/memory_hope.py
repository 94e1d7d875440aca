"""Hope's mixer: memories that learn while they read (Nested Learning, arXiv 2512.24695, Eq. 83-93).

What the memories have learned so far is the cache: it has the same size after ten tokens or a million.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bank_hope import Bank, Memory
from .chunk_hope import Layer, make_tables
from .columns_hope import Columns, Norm, RowPosition, State, as_written, choose, mix_groups, to_unit
from .token_hope import read_and_write


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
        numbers = tuple(name for name in ("eta", "alpha") if name in adaptive)
        sizes = dict.fromkeys(["mem", *names], dim) | dict.fromkeys(numbers, 1)
        self.memories = {name: Memory(heads, dim, size, hidden) for name, size in sizes.items()}
        self.bank = Bank(config, self.memories, numbers)
        self.period, self.projections = config.chunk_size, config.projection_chunk_size or config.chunk_size
        split = self.projections != self.period
        banks = {name: "projection" if split and name != "mem" else "memory" for name in sizes}
        self.banks = nn.ModuleDict({bank: nn.ModuleDict() for bank in dict.fromkeys(banks.values())})
        for name, bank in banks.items():
            self.banks[bank][name] = self.memories[name]
        self.far = None
        if config.far is not None:
            self.memories["far"] = Memory(heads, dim, dim, hidden)
            self.far = Bank(config, {"far": self.memories["far"]}, ())
            self.banks["far"] = nn.ModuleDict({"mem": self.memories["far"]})
            gates = ["far_eta"] + ["far_alpha"] * config.retention
            self.gates.update({name: HopeGate(heads, dim) for name in gates})
        self.norm = Norm(heads, dim, eps=model.norm_eps)
        if is_whole:
            self.out_proj = nn.Linear(heads * dim, model.d_model, bias=False)

    def initial_state(self, batch: int) -> State:
        """Return weights, momenta and boundary weights of all memories, and the tail of the convolution."""
        state = {}
        for prefix, bank in (("", self.bank), ("far/", self.far)):
            for name, weight in {} if bank is None else bank.pack(self.memories).items():
                weights = weight.expand(batch, *weight.shape)
                state |= {f"{prefix}{name}": weights, f"boundary/{prefix}{name}": weights}
                if self.config.momentum and not prefix:
                    state[f"momentum/{name}"] = torch.zeros_like(weights)
        if self.conv is not None:
            weight = self.conv["weight"]
            state["tail"] = weight.new_zeros(batch, weight.shape[1] - 1, weight.shape[0])
        return state

    def forward(self, x: Tensor, state: State, columns: Columns) -> tuple[Tensor, State]:
        """Mix `[B, T, N]`; padding neither moves a memory nor counts as a token."""
        return mix_groups(self._run, x, state or self.initial_state(x.shape[0]), columns)

    def weights(self, state: State, kind: str, name: str) -> State:
        """Return the matrices of a memory: those it has now, or of a kind such as `boundary/`."""
        bank, kind = (self.bank, kind) if name != "far" else (self.far, f"{kind}far/")
        return bank.part({matrix: state[f"{kind}{matrix}"] for matrix in bank.sizes}, name)

    def _run(self, x: Tensor, state: State, position: RowPosition) -> tuple[Tensor, State]:
        y, state = self.answer(x, state, position)
        return self.out_proj(y), state

    def answer(self, x: Tensor, state: State, position: RowPosition) -> tuple[Tensor, State]:
        """Mix tokens without padding, and without the map out: `[B, T, H * D]`.

        Of more than one token, all rows stand at the same place of a chunk.
        """
        state, size = dict(state), self.config.chunk_size
        streams, gate = self._streams(x, state)
        outputs, read = [], 0
        with as_written(x):
            while read < x.shape[1]:
                stop = min(x.shape[1], read + size - (position.counts[0] + read) % size)
                self._begin(state, position + read, x.device)
                if x.shape[1] == 1 and self.dim > 1 and not torch.is_grad_enabled():
                    by_head = streams.view(len(x), self.heads, 3, self.dim)
                    y = read_and_write(self.config, self.bank, self.gates, by_head, state, self._far)
                else:
                    y = self._chunk(streams[:, read:stop].permute(3, 0, 2, 1, 4), state).transpose(1, 2)
                outputs.append(y)
                read = stop
        y = self.norm(outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)).to(x.dtype)  # [B, T, H, D]
        return (y if gate is None else y * F.silu(gate)).flatten(2), state

    def _streams(self, x: Tensor, state: State) -> tuple[Tensor, Tensor | None]:
        """Return keys, values and queries `[B, T, H, 3, D]`, and the gate's input; move the tail in `state`."""
        mixed, gate = self.in_proj(x), None
        if self.config.gate:
            mixed = mixed.unflatten(-1, (self.heads, 4, self.dim))
            mixed, gate = mixed[..., :3, :].flatten(2), mixed[..., 3, :]
        if self.conv is not None:
            weight = self.conv["weight"].to(x.dtype)
            padded = torch.cat([state["tail"].to(x.dtype), mixed], dim=1)
            state["tail"] = padded[:, x.shape[1] :]
            if x.shape[1] == 1:
                mixed = F.silu((padded.float() * weight.mT.float()).sum(1, keepdim=True).to(x.dtype))
            else:
                mixed = F.silu(F.conv1d(padded.mT, weight[:, None], groups=weight.shape[0])).mT
        return mixed.float().unflatten(-1, (self.heads, 3, self.dim)), gate

    def _begin(self, state: State, position: RowPosition, device: torch.device) -> None:
        """Start memories anew where they are to (`reset_every`), and take over weights where a chunk begins."""
        config = self.config
        if config.reset_every is not None and (begins := position.begins(config.reset_every, device)) is not False:
            for name, initial in self.initial_state(len(position.counts)).items():
                if name != "tail" and "far/" not in name:
                    state[name] = choose(begins, initial, state[name])
        if self.far is not None and (begins := position.begins(config.far.chunk_size, device)) is not False:
            for name in self.far.sizes:
                state[f"boundary/far/{name}"] = choose(begins, state[f"far/{name}"], state[f"boundary/far/{name}"])
        own, others = (position.begins(period, device) for period in (self.period, self.projections))
        if own is False:
            return
        for name, size in self.bank.sizes.items():
            now, before = state[name], state[f"boundary/{name}"]
            if own is others:
                state[f"boundary/{name}"] = choose(own, now, before)
            else:
                parts = ((own, slice(0, size)), (others, slice(size, None)))
                chosen = [choose(begins, now[:, :, part], before[:, :, part]) for begins, part in parts]
                state[f"boundary/{name}"] = torch.cat(chosen, dim=2)

    def _chunk(self, streams: Tensor, state: State) -> Tensor:
        """Move all memories over a chunk or a part of one, in `state`; return what its queries read `[B, H, C, D]`."""
        config, bank = self.config, self.bank
        unit = dict(zip("kvq", to_unit(streams), strict=True))
        asked = {
            name: self.memories[name].retrieve(self.weights(state, "boundary/", name), unit.get(name, unit["k"]))
            for name in bank.names[1:]
        }
        gates = {name: gate(asked.get(name, unit["k"])) for name, gate in self.gates.items()}
        eta, mu = config.eta_max * gates["eta"], gates.get("mu")
        alpha = gates["alpha"] if config.retention else torch.ones_like(eta)
        q, k = (to_unit(asked[name]) if name in asked else unit[name] for name in "qk")
        v = asked.get("v", streams[1])
        v = to_unit(v) if config.targets == "self" else v
        tables = make_tables(eta, alpha, mu)
        several, erase = tables.of_several(), config.inner_rule == "dgd"
        scale = 1 - mu if mu is not None and config.momentum_write == "averaged" else None
        known = {name: state[f"boundary/{name}"] for name in bank.sizes}
        layers = {}
        for name, (key, value) in bank.writes(known, k, v, scale).items():
            shared, momentum = tables if name in ("w", "w2") else several, state.get(f"momentum/{name}")
            moved = [state[name], momentum]
            if name == "w1_gates":  # a row is a matrix that answers with a number
                moved = [None if one is None else one.unsqueeze(3) for one in moved]
            layer = Layer(shared, key, value, *moved)
            layers[name] = layer.erasing() if erase else layer
            after, momentum = layers[name].after()
            state[name] = after.view(state[name].shape)
            if momentum is not None:
                state[f"momentum/{name}"] = momentum.view(state[name].shape)
        if config.read == "boundary":
            output = self.memories["mem"].retrieve(self.weights(known, "", "mem"), q)
        else:
            reading = tables.before() if config.read == "prefix" else tables
            name = "w" if bank.linear else "w2"
            output = layers[name].first(bank.sizes[name]).read(reading, q)
            if not bank.linear:
                output = q + layers["w1"].of_first(tables).read(reading, F.silu(output))
        if self.far is not None:
            output = output + self._far(state, streams, unit)
        return output

    def _far(self, state: State, streams: Tensor, unit: dict[str, Tensor]) -> Tensor:
        """Write the far memory by gradient descent, in `state`; return its answers to the queries before the write."""
        k, v = unit["k"], unit["v"] if self.config.targets == "self" else streams[1]
        eta = self.config.eta_max * self.gates["far_eta"](k)
        alpha = self.gates["far_alpha"](k) if self.config.retention else torch.ones_like(eta)
        tables = make_tables(eta, alpha, None)
        known = {name: state[f"boundary/far/{name}"] for name in self.far.sizes}
        for name, (key, value) in self.far.writes(known, k, v, None).items():
            shared = tables if name in ("w", "w2") else tables.of_several()
            state[f"far/{name}"], _ = Layer(shared, key, value, state[f"far/{name}"], None).after()
        return self.memories["far"].retrieve(self.far.part(known, "far"), unit["q"])
