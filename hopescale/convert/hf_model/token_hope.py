"""A single token's step of Hope's memories without gradients, in the fewest operations; generation runs it.

All memories of a head are asked and written together. Tensors of the state that a step was given stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.linalg import vecdot, vector_norm

from .bank_hope import KEY_EPS, Bank
from .columns_hope import State, to_unit

Far = Callable[[State, Tensor, dict[str, Tensor]], Tensor]


class Rates(NamedTuple):
    """Gates of a token `[B, H, 1, 1]`; `push` is the rate at which a write enters the momentum, or else the state."""

    eta: Tensor
    push: Tensor
    alpha: Tensor | None
    mu: Tensor | None

    def of_several(self) -> Rates:
        """Return the same with a dimension for memories behind the heads."""
        alpha, mu = (None if rate is None else rate.unsqueeze(2) for rate in (self.alpha, self.mu))
        return Rates(self.eta.unsqueeze(2), self.push, alpha, mu)


def read_and_write(
    config: SimpleNamespace, bank: Bank, gates: nn.ModuleDict, streams: Tensor, state: State, far: Far
) -> Tensor:
    """Move all memories over a token, in `state`; return what its queries read `[B, 1, H, D]`.

    Args:
        config: Config of the mixer.
        bank: Memories but the far one.
        gates: Gates of the mixer.
        streams: Keys, values and queries `[B, H, 3, D]`.
        state: State of the mixer, with boundary weights as they are for the token.
        far: Step of the far memory.
    """
    kvq, answers, numbers, outside = to_unit(streams), None, None, None
    row, first = kvq.view(-1, *kvq.shape[2:]), state["boundary/w" if bank.linear else "boundary/w2"].flatten(0, 1).mT
    if len(bank.names) > 1:
        found = row.bmm(first).view(*kvq.shape[:3], -1)
        answers, numbers = _linear_answers(bank, found) if bank.linear else _mlp_answers(bank, found, state)
    rates = _rates(config, bank, gates, kvq, numbers)
    if config.far is not None:
        unit = {name: kvq[:, :, number : number + 1].clone() for number, name in enumerate("kvq")}
        outside = far(state, streams.permute(2, 0, 1, 3).unsqueeze(3), unit)
    if bank.asked is not None:
        part = kvq[:, :, bank.asked]
        part = part.copy_(answers) if bank.linear else part.add_(answers)
        part.mul_(part.square().sum(-1, keepdim=True).add_(1e-6).rsqrt_())
    if config.targets == "value":
        kvq[:, :, 1] = streams[:, :, 1]
    output = (_move_linear if bank.linear else _move_mlp)(config, bank, state, (kvq, row), first, rates)
    output = output.view(len(streams), 1, *streams.shape[1::2])
    return output if outside is None else output + outside.transpose(1, 2)


def _linear_answers(bank: Bank, found: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return what memories of streams answer to theirs `[B, H, n, D]`, and gates' memories to the first `[B, H, M]`.

    Args:
        bank: Memories.
        found: Products of their first matrices and the streams `[B, H, 3, .]`.
    """
    cut = bank.vectors * bank.dim
    numbers = found[:, :, 0, cut:]
    if bank.asked is None:
        return None, numbers
    return found[:, :, bank.asked, bank.dim : cut].unflatten(-1, (-1, bank.dim)).diagonal(0, 2, 3).mT, numbers


def _mlp_answers(bank: Bank, found: Tensor, state: State) -> tuple[Tensor | None, Tensor | None]:
    """Return the same for MLPs, without what they add to."""
    hidden, numbers = F.silu(found).view(*found.shape[:3], -1, bank.hidden), None
    if bank.gates:
        numbers = vecdot(hidden[:, :, 0, bank.vectors :], state["boundary/w1_gates"])
    if bank.asked is None:
        return None, numbers
    hidden = hidden[:, :, bank.asked, 1 : bank.vectors].diagonal(0, 2, 3).mT.unsqueeze(3)  # [B, H, n, 1, E]
    return vecdot(state["boundary/w1"][:, :, 1:], hidden), numbers


def _rates(config: SimpleNamespace, bank: Bank, gates: nn.ModuleDict, unit: Tensor, numbers: Tensor | None) -> Rates:
    shape, found = (*unit.shape[:2], 1, 1), {}
    if bank.gates:
        bias = torch.stack([gates[name].bias for name in bank.gates], dim=-1)
        opened = (numbers + bias).sigmoid_().view(*shape, -1).unbind(-1)
        found = dict(zip(bank.gates, opened, strict=True))
    for name in ("eta", "alpha", "mu"):
        if name in gates and name not in found:
            gate = gates[name]
            found[name] = vecdot(unit[:, :, 0], gate.weight.float()).add_(gate.bias).sigmoid_().view(shape)
    eta, mu = found["eta"], found.get("mu")
    eta = eta if config.eta_max == 1 else config.eta_max * eta
    averaged = mu is not None and config.momentum_write == "averaged"
    return Rates(eta, torch.addcmul(eta, eta, mu, value=-1) if averaged else eta, found.get("alpha"), mu)


def _move_linear(
    config: SimpleNamespace, bank: Bank, state: State, streams: tuple[Tensor, Tensor], first: Tensor, rates: Rates
) -> Tensor:
    """Write linear memories; return what queries read `[B * H, 1, D]`.

    Args:
        config: Config of the mixer.
        bank: Memories.
        state: State of the mixer.
        streams: Keys, values and queries `[B, H, 3, D]`, and the same `[B * H, 3, D]`.
        first: Boundary weights of the first matrix, transposed `[B * H, D, .]`.
        rates: Gates.
    """
    (kvq, row), dot = streams, config.objective == "dot"
    k, v = row[:, :1], row[:, 1:2]
    if config.targets == "self":
        error = (v if dot else k - v).bmm(first)
        error = error.neg_() if dot else error
    else:
        error = -v if dot else k.bmm(first) - v
    error = error.view(*kvq.shape[:2], -1, 1)  # [B, H, R, 1]
    if config.error_cap is not None and not dot:
        cut = bank.vectors * bank.dim
        _cap(config, error[:, :, :cut, 0].unflatten(-1, (-1, bank.dim)))
        _cap(config, error[:, :, cut:])
    known = row.bmm(state["w"].flatten(0, 1).mT)
    held = known[:, 0].view(error.shape) if config.inner_rule == "dgd" else None
    _write(state, "w", rates, kvq[:, :, :1], error * rates.push, held)
    if config.read == "prefix":
        return known[:, 2:, : bank.dim]
    weights = first if config.read == "boundary" else state["w"].flatten(0, 1).mT
    return row[:, 2:].bmm(weights[..., : bank.dim])


def _move_mlp(
    config: SimpleNamespace, bank: Bank, state: State, streams: tuple[Tensor, Tensor], first: Tensor, rates: Rates
) -> Tensor:
    """Do the same with MLP memories."""
    (kvq, row), width = streams, bank.hidden
    inner, k, v = row.bmm(first), kvq[:, :, :1], kvq[:, :, 1:2]
    hidden, shape = F.silu(inner), (*kvq.shape[:3], -1, width)
    writes = _mlp_writes(config, bank, state, (k, v), (inner.view(shape), hidden.view(shape)), rates.push)
    second, erase = state["w1"], config.inner_rule == "dgd"
    known = row.bmm(state["w2"].flatten(0, 1).mT)
    held = known[:, 0].view(writes["w2"].shape) if erase else None
    _write(state, "w2", rates, k, writes["w2"], held)
    for name in ("w1_gates", "w1") if bank.gates else ("w1",):
        key, value = writes[name]
        held = vecdot(state[name], key).unsqueeze(-1) if erase else None
        _write(state, name, rates if name == "w1_gates" else rates.of_several(), key, value, held)
    if config.read == "boundary":
        hidden, second = hidden[:, 2:, :width], state["boundary/w1"]
    elif config.read == "prefix":
        hidden = F.silu(known[:, 2:, :width])
    else:
        hidden, second = F.silu(row[:, 2:].bmm(state["w2"][:, :, :width].flatten(0, 1).mT)), state["w1"]
    return torch.baddbmm(row[:, 2:], hidden, second[:, :, 0].flatten(0, 1).mT)


def _mlp_writes(
    config: SimpleNamespace,
    bank: Bank,
    state: State,
    pair: tuple[Tensor, Tensor],
    layer: tuple[Tensor, Tensor],
    push: Tensor,
) -> dict[str, Any]:
    """Return value of the write into `w2`, key and value of those into the other matrices, as `_write` takes them.

    Args:
        config: Config of the mixer.
        bank: Memories.
        state: State with boundary weights.
        pair: Keys and values `[B, H, 1, D]`.
        layer: Hidden layers of the streams before and after their SiLU: `[B, H, 3, M, E]`.
        push: Rate of writes.
    """
    cut, second = bank.vectors, state["boundary/w1"]
    gates = state.get("boundary/w1_gates")
    own, target = layer[1].unbind(2)[:2]  # [B, H, M, E]
    error, numbers = _mlp_errors(config, pair, own, target, second, gates)
    back = error.view(-1, 1, bank.dim).bmm(second.flatten(0, 2)).view(*own.shape[:2], cut, -1)
    back = back if gates is None else torch.cat([back, numbers * gates], dim=2)
    first = torch.ops.aten.silu_backward(back, layer[0][:, :, 0])
    length = written = vector_norm(own, dim=-1, keepdim=True).square_().add_(KEY_EPS).sqrt_()
    if bank.normalize:  # divided by squares of what errors are amplified by, above 1
        size = vector_norm(error, dim=-1, keepdim=True)
        size = size if gates is None else torch.cat([size, numbers.abs()], dim=2)
        gain = vector_norm(first, dim=-1, keepdim=True).div_(size.clamp_min_(1e-15))
        first.div_(gain.clamp_min_(1.0).square_())
        written = torch.minimum(length, length.reciprocal())
    key, written = own / length, written * push
    writes = {"w2": first.mul_(push).view(*own.shape[:2], -1, 1)}
    if gates is None:
        return writes | {"w1": (key.unsqueeze(3), (error * written).unsqueeze(-1))}
    writes["w1"] = key[:, :, :cut].unsqueeze(3), (error * written[:, :, :cut]).unsqueeze(-1)
    writes["w1_gates"] = key[:, :, cut:], numbers * written[:, :, cut:]
    return writes


def _mlp_errors(
    config: SimpleNamespace,
    pair: tuple[Tensor, Tensor],
    own: Tensor,
    target: Tensor,
    second: Tensor,
    gates: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return gradients with respect to answers: of vectors `[B, H, M, D]`, and of numbers `[B, H, M, 1]`.

    Answers are linear in what the hidden layer gives, so that the difference of two answers takes one product.
    """
    (k, v), dot, to_own = pair, config.objective == "dot", config.targets == "self"
    if dot and not to_own:
        return -v, None
    if dot:
        change, base = target, v
    else:
        change, base = own - target if to_own else own, k - v
    cut, numbers = second.shape[2], None
    if gates is not None:
        numbers = vecdot(change[:, :, cut:], gates).unsqueeze(-1)
        change = change[:, :, :cut]
    vectors = vecdot(second, change.unsqueeze(3)).add_(base)
    for error in (vectors,) if numbers is None else (vectors, numbers):
        if dot:
            error.neg_()
        elif config.error_cap is not None:
            _cap(config, error)
    return vectors, numbers


def _cap(config: SimpleNamespace, error: Tensor) -> None:
    """Limit the norm of errors, in place."""
    scale = config.error_cap * torch.rsqrt(error.square().sum(-1, keepdim=True) + 1e-12)
    error.mul_(scale.clamp_max_(1.0))


def _write(state: State, name: str, rates: Rates, key: Tensor, value: Tensor, held: Tensor | None) -> None:
    """Replace a matrix, and its momentum, in `state`.

    Args:
        state: State of the mixer.
        name: Name of the matrix.
        rates: Gates of the token.
        key: Row `[., 1, D]`.
        value: Column that is taken off along the key, times its rate, `[., Do, 1]`.
        held: Answer to the key before the write, `[., Do, 1]`; None if writes do not erase it.
    """
    after, momentum = state[name], state.get(f"momentum/{name}")
    if momentum is None:
        after = after.clone() if rates.alpha is None else after * rates.alpha
        after.addcmul_(value, key, value=-1)
    else:
        momentum = state[f"momentum/{name}"] = (momentum * rates.mu).addcmul_(value, key, value=-1)
        after = momentum + after if rates.alpha is None else torch.addcmul(momentum, after, rates.alpha)
    if held is not None:
        after.addcmul_(held, key * rates.eta, value=-1)
    state[name] = after
