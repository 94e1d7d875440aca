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

from .bank_hope import KEY_EPS, Bank
from .columns_hope import State, to_unit

Far = Callable[[State, Tensor, dict[str, Tensor]], Tensor]


class Rates(NamedTuple):
    """Gates of a token `[B, H, 1, 1]`; `push` is the rate at which a write enters the momentum, or else the state."""

    eta: Tensor
    push: Tensor
    alpha: Tensor | None
    mu: Tensor | None


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
    kvq = to_unit(streams)
    row, asked, numbers = kvq.flatten(0, 1), _asked(bank), None
    if len(bank.names) > 1:
        answers, numbers = (_ask_linear if bank.linear else _ask_mlp)(bank, state, row[:, : max(asked, default=0) + 1])
    rates = _rates(config, bank, gates, kvq[:, :, 0], numbers)
    outside = None
    if config.far is not None:
        unit = {name: kvq[:, :, number : number + 1].clone() for number, name in enumerate("kvq")}
        outside = far(state, streams.permute(2, 0, 1, 3).unsqueeze(3), unit)
    if asked:  # at most three streams: any two or more of them are evenly spaced
        step = asked[1] - asked[0] if len(asked) > 1 else 1
        own = slice(asked[0], asked[-1] + 1, step)
        part, found = kvq[:, :, own], answers[:, :, 1:, own].diagonal(0, 2, 3).mT
        part = part.copy_(found) if bank.linear else part.add_(found)
        part.mul_(part.square().sum(-1, keepdim=True).add_(1e-6).rsqrt_())
    if config.targets == "value":
        kvq[:, :, 1] = streams[:, :, 1]
    output = (_move_linear if bank.linear else _move_mlp)(config, bank, state, kvq, rates)
    output = output.view(len(streams), 1, *streams.shape[1::2])
    return output if outside is None else output + outside.transpose(1, 2)


def _asked(bank: Bank) -> list[int]:
    """Return which of the streams keys, values and queries a memory answers."""
    return [number for number, name in enumerate("kvq") if name in bank.names]


def _ask_linear(bank: Bank, state: State, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return answers to rows `[B * H, n, D]`: `[B, H, M, n, D]`, and numbers `[B, H, M]` in answer to the first."""
    weights = state["boundary/w"]
    found = rows.bmm(weights.flatten(0, 1).mT).view(*weights.shape[:2], rows.shape[1], -1)  # [B, H, n, R]
    cut = bank.vectors * bank.dim
    return found[..., :cut].unflatten(-1, (-1, bank.dim)).transpose(2, 3), found[:, :, 0, cut:]


def _ask_mlp(bank: Bank, state: State, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    first, second = state["boundary/w2"], state["boundary/w1"]
    batch, count = first.shape[:2], rows.shape[1]
    hidden = F.silu(rows.bmm(first.flatten(0, 1).mT)).view(*batch, count, -1, bank.hidden)
    numbers = None
    if bank.gates:
        numbers = (hidden[:, :, 0, bank.vectors :] * state["boundary/w1_gates"][:, :, :, 0]).sum(-1)
    if bank.vectors == 1:
        return hidden, numbers
    vectors = hidden[:, :, :, : bank.vectors].transpose(2, 3).reshape(-1, count, bank.hidden)
    return vectors.bmm(second.flatten(0, 2).mT).view(*batch, bank.vectors, count, bank.dim), numbers


def _rates(config: SimpleNamespace, bank: Bank, gates: nn.ModuleDict, k: Tensor, numbers: Tensor | None) -> Rates:
    found = {}
    if bank.gates:
        bias = torch.stack([gates[name].bias for name in bank.gates], dim=-1)
        opened = (numbers + bias).sigmoid_()
        found = dict(zip(bank.gates, opened[:, :, None, None].unbind(-1), strict=True))
    for name in ("eta", "alpha", "mu"):
        if name in gates and name not in found:
            gate = gates[name]
            found[name] = (k * gate.weight).sum(-1).add_(gate.bias).sigmoid_()[..., None, None]
    eta, mu = found["eta"], found.get("mu")
    eta = eta if config.eta_max == 1 else config.eta_max * eta
    averaged = mu is not None and config.momentum_write == "averaged"
    return Rates(eta, torch.addcmul(eta, eta, mu, value=-1) if averaged else eta, found.get("alpha"), mu)


def _move_linear(config: SimpleNamespace, bank: Bank, state: State, kvq: Tensor, rates: Rates) -> Tensor:
    """Write linear memories; return what queries read `[B * H, 1, D]`."""
    boundary, before = state["boundary/w"].flatten(0, 1), state["w"].flatten(0, 1)
    row, batch = kvq.flatten(0, 1), kvq.shape[:2]
    k, v, q = kvq[:, :, :1], kvq[:, :, 1:2], row[:, 2:]
    if config.targets == "self":
        asked = v if config.objective == "dot" else k - v
        error = asked.flatten(0, 1).bmm(boundary.mT).view(*batch, 1, -1)  # [B, H, 1, R]
        error = error.neg_() if config.objective == "dot" else error
    else:
        error = -v if config.objective == "dot" else row[:, :1].bmm(boundary.mT).view(v.shape) - v
    if config.error_cap is not None and config.objective != "dot":
        cut = bank.vectors * bank.dim
        _cap(config, error[..., :cut].unflatten(-1, (-1, bank.dim)))
        _cap(config, error[..., cut:].unsqueeze(-1))
    known = row[:, ::2].bmm(before.mT)  # of keys and queries
    held = known[:, 0].view(*batch, -1, 1) if config.inner_rule == "dgd" else None
    _write(state, "w", rates, k, (error * rates.push).mT, held)
    if config.read == "prefix":
        return known[:, 1:, : bank.dim]
    weights = boundary if config.read == "boundary" else state["w"].flatten(0, 1)
    return q.bmm(weights[:, : bank.dim].mT)


def _move_mlp(config: SimpleNamespace, bank: Bank, state: State, kvq: Tensor, rates: Rates) -> Tensor:
    """Write MLP memories; return what queries read `[B * H, 1, D]`."""
    batch, width, row = kvq.shape[:2], bank.hidden, kvq.flatten(0, 1)
    inner = row[:, : 3 if config.read == "boundary" else 2].bmm(state["boundary/w2"].flatten(0, 1).mT)
    hidden = F.silu(inner)
    writes = _mlp_writes(config, bank, state, kvq, (inner, hidden), rates.push)
    before, second, erase = state["w2"].flatten(0, 1), state["w1"], config.inner_rule == "dgd"
    known = row[:, ::2].bmm(before.mT)  # of keys and queries
    held = known[:, 0].view(*batch, -1, 1) if erase else None
    _write(state, "w2", rates, kvq[:, :, :1], writes["w2"], held)
    several = Rates(*(None if rate is None else rate.unsqueeze(2) for rate in rates))
    key, value = writes["w1"]
    held = key.reshape(-1, 1, width).bmm(second.flatten(0, 2).mT).view(value.shape) if erase else None
    _write(state, "w1", several, key, value, held)
    if bank.gates:
        key, value = writes["w1_gates"]
        held = (state["w1_gates"] * key).sum(-1, keepdim=True) if erase else None
        _write(state, "w1_gates", several, key, value, held)
    if config.read == "boundary":
        hidden, second = hidden[:, 2:, :width], state["boundary/w1"]
    elif config.read == "prefix":
        hidden = F.silu(known[:, 1:, :width])
    else:
        hidden, second = F.silu(row[:, 2:].bmm(state["w2"][:, :, :width].flatten(0, 1).mT)), state["w1"]
    return torch.baddbmm(row[:, 2:], hidden, second[:, :, 0].flatten(0, 1).mT)


def _mlp_writes(
    config: SimpleNamespace, bank: Bank, state: State, kvq: Tensor, layer: tuple[Tensor, Tensor], push: Tensor
) -> dict[str, Any]:
    """Return value of the write into `w2`, key and value of those into the other matrices, as `_write` takes them.

    Args:
        config: Config of the mixer.
        bank: Memories.
        state: State with boundary weights.
        kvq: Keys, values and queries `[B, H, 3, D]`.
        layer: What the hidden layer gives for keys and values, before and after its SiLU: `[B * H, n, M * E]`.
        push: Rate of writes.
    """
    cut, width, batch = bank.vectors, bank.hidden, kvq.shape[:2]
    second = state["boundary/w1"].flatten(0, 2)
    gates = state["boundary/w1_gates"].squeeze(3) if bank.gates else None
    inner, own = (one[:, 0].view(*batch, -1, width) for one in layer)  # [B, H, M, E]
    error, numbers = _mlp_errors(config, kvq, own, layer[1], second, gates)
    back = error.view(-1, 1, bank.dim).bmm(second).view(*batch, cut, width)
    back = back if gates is None else torch.cat([back, numbers * gates], dim=2)
    first = torch.ops.aten.silu_backward(back, inner)
    length = written = torch.linalg.vector_norm(own, dim=-1, keepdim=True).square_().add_(KEY_EPS).sqrt_()
    if bank.normalize:  # divided by squares of what errors are amplified by, above 1
        size = torch.linalg.vector_norm(error, dim=-1, keepdim=True)
        size = size if gates is None else torch.cat([size, numbers.abs()], dim=2)
        gain = torch.linalg.vector_norm(first, dim=-1, keepdim=True).div_(size.clamp_min_(1e-15))
        first.div_(gain.clamp_min_(1.0).square_())
        written = torch.minimum(length, length.reciprocal())
    key, written = (own / length).unsqueeze(3), (written * push).unsqueeze(3)
    writes = {"w2": first.mul_(push).view(*batch, -1, 1)}
    writes["w1"] = key[:, :, :cut], error.unsqueeze(-1) * written[:, :, :cut]
    if gates is not None:
        writes["w1_gates"] = key[:, :, cut:], numbers.unsqueeze(-1) * written[:, :, cut:]
    return writes


def _mlp_errors(
    config: SimpleNamespace, kvq: Tensor, own: Tensor, hidden: Tensor, second: Tensor, gates: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return gradients with respect to answers: of vectors `[B, H, M, D]`, and of numbers `[B, H, M, 1]`.

    Answers are linear in what the hidden layer gives, so that the difference of two answers takes one product.
    """
    k, v, dot, own_target = kvq[:, :, :1], kvq[:, :, 1:2], config.objective == "dot", config.targets == "self"
    if dot and not own_target:
        return -v, None
    if own_target:
        target = hidden[:, 1].view(own.shape)
        change, base = (target, v) if dot else (own - target, k - v)
    else:
        change, base = own, k - v
    cut = len(second) // base[:, :, 0, 0].numel()
    vectors = change[:, :, :cut].reshape(-1, 1, own.shape[-1]).bmm(second.mT)
    vectors = vectors.view(*own.shape[:2], cut, -1).add_(base)
    numbers = None if gates is None else (change[:, :, cut:] * gates).sum(-1, keepdim=True)
    found = [vectors] if numbers is None else [vectors, numbers]
    for error in found:
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
        key: `[., 1, D]`.
        value: What is taken off, times its rate, `[., Do, 1]`.
        held: What the key held `[., Do, 1]`; None if a write does not erase it.
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
