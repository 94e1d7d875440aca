"""Deep momentum: the momentum is a network that learns the gradient's rows while it is asked for the update."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from hopescale.cost.updates import DEEP_MEMORY_DIM
from hopescale.ops.draws import RandomBits, normal
from hopescale.optim.muon import move, scale_to_rms
from hopescale.optim.stacked import StackedOptimizer


def deep_momentum_update(
    weight: list[Tensor],
    grad: list[Tensor],
    memory: list[Tensor] | None = None,
    memory_w1: list[Tensor] | None = None,
    memory_w2: list[Tensor] | None = None,
    *,
    lr: float,
    alpha: float = 0.9,
    inner_lr: float = 0.01,
    objective: Literal["dot", "l2"] = "dot",
    update_rms: float | None = None,
    weight_decay: float = 0.0,
) -> None:
    """Take one step of deep momentum, DMGD (Nested Learning, Eq. 50), with stacks of matrices `[..., R, C]`, in place.

    A row `g_i = s_i u_i` of the gradient has length `s_i` and direction `u_i`, which is key and target at once:

        inner loss   L = -<m(u_i), u_i>  (dot)   or   1/2 |m(u_i) - u_i|^2  (l2),   summed over rows
        memory       m(u) = u + W1 tanh(W2 u)    or   m(u) = A u
        write        phi <- alpha phi - inner_lr dL/dphi,   phi = W1, W2 or A
        read         W_i <- (1 - lr wd) W_i - lr s_i m(u_i),   with the memory just written

    tanh is odd: the opposite gradient gives the opposite update. Rows of zeros write nothing.

    Args:
        weight: Changed.
        grad: Gradient.
        memory: `A` `[..., C, C]` of linear memories, changed; None for MLPs.
        memory_w1: `W1` `[..., C, E]`, changed.
        memory_w2: `W2` `[..., E, C]`, changed.
        lr: Learning rate.
        alpha: Retention of the memory per update.
        inner_lr: Inner learning rate, for a loss that is summed over rows.
        objective: Inner loss, `dot` or `l2`.
        update_rms: Scale each matrix of updates to this root mean square; None leaves rows as long as read.
        weight_decay: Decoupled, per unit of learning rate.
    """
    length = [torch.linalg.vector_norm(g, dim=-1, keepdim=True) for g in grad]  # [..., R, 1]
    update = torch._foreach_div(grad, torch._foreach_clamp_min(length, torch.finfo(grad[0].dtype).tiny))
    u = [each.reshape(-1, *each.shape[-2:]) for each in update]  # [K, R, C]
    write = {"rate": -inner_lr if objective == "l2" else inner_lr, "alpha": alpha}
    if memory is not None:
        answer = _through_linear(u, _batches(memory), objective == "l2", **write)
    else:
        answer = _through_mlp(u, _batches(memory_w1), _batches(memory_w2), objective == "l2", **write)
    update = [each.view(g.shape) for each, g in zip(answer, grad, strict=True)]
    torch._foreach_mul_(update, length)
    if update_rms is not None:
        scale_to_rms(update, update_rms)
    move(weight, update, 1 - lr * weight_decay, [lr] * len(weight))


def _batches(memories: list[Tensor]) -> list[Tensor]:
    """Return memories `[..., r, c]` as batches `[K, r, c]` of the same storage."""
    return [each.view(-1, *each.shape[-2:]) for each in memories]


def _through_linear(u: list[Tensor], a: list[Tensor], is_l2: bool, *, rate: float, alpha: float) -> list[Tensor]:
    """Write rows `[K, R, C]` to linear memories and return what these answer then."""
    # What a write takes to, or with a negative rate from, the memory: targets, or errors.
    written = [torch.baddbmm(x, x, m.mT, beta=-1) for x, m in zip(u, a, strict=True)] if is_l2 else u
    for m, x, value in zip(a, u, written, strict=True):
        m.baddbmm_(value.mT, x, beta=alpha, alpha=rate)
    return [torch.bmm(x, m.mT) for x, m in zip(u, a, strict=True)]


def _through_mlp(
    u: list[Tensor], w1: list[Tensor], w2: list[Tensor], is_l2: bool, *, rate: float, alpha: float
) -> list[Tensor]:
    """Write rows `[K, R, C]` to MLPs and return what these answer then, in the place of the rows."""
    hidden = [torch.bmm(x, m.mT) for x, m in zip(u, w2, strict=True)]  # [K, R, E]
    torch._foreach_tanh_(hidden)
    written = [torch.bmm(h, m.mT) for h, m in zip(hidden, w1, strict=True)] if is_l2 else u
    inner = [torch.bmm(value, m) for value, m in zip(written, w1, strict=True)]
    torch._foreach_addcmul_(inner, torch._foreach_mul(inner, hidden), hidden, value=-1)  # times the slope of tanh
    for m1, m2, x, h, value, slope in zip(w1, w2, u, hidden, written, inner, strict=True):
        m1.baddbmm_(value.mT, h, beta=alpha, alpha=rate)
        m2.baddbmm_(slope.mT, x, beta=alpha, alpha=rate)
    hidden = [torch.bmm(x, m.mT) for x, m in zip(u, w2, strict=True)]
    torch._foreach_tanh_(hidden)
    for x, h, m in zip(u, hidden, w1, strict=True):
        x.baddbmm_(h, m.mT)
    return u


class DeepMomentum(StackedOptimizer):
    """Deep momentum gradient descent, DMGD (Nested Learning, section 4.4): one memory per matrix.

    Matrices of a shape have memories of one shape, which are written and read as one batch. State per parameter
    `[..., R, C]`: `memory_w1` `[..., C, E]` and `memory_w2` `[..., E, C]`, or `memory` `[..., C, C]`. `W1` and `A`
    start at zero, so that the first read is close to the gradient (MLP) or to what was just written (linear); `W2`
    starts with normal random numbers, the same for all matrices of a shape.

    Args:
        params: Parameters `[..., R, C]`.
        lr: Learning rate.
        memory: Kind of the memory, `mlp` or `linear`.
        memory_dim: Hidden width `E` of an MLP memory; None, which a linear one needs, is 32.
        settings: Settings of `deep_momentum_update`.

    Raises:
        ValueError: If a parameter is no matrix, or a setting has no such value.
    """

    rule = staticmethod(deep_momentum_update)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        memory: Literal["mlp", "linear"] = "mlp",
        memory_dim: int | None = None,
        **settings: Any,
    ):
        if memory not in ("mlp", "linear"):
            raise ValueError(f"memory is {memory!r}; it can be mlp or linear")
        if memory == "linear" and memory_dim is not None:
            raise ValueError(f"memory_dim is {memory_dim}, but a linear memory has no hidden width")
        if memory_dim is not None and memory_dim < 1:
            raise ValueError(f"memory_dim is {memory_dim}; a hidden layer has at least one entry")
        self._hidden = None if memory == "linear" else memory_dim or DEEP_MEMORY_DIM
        super().__init__(params, lr, **settings)

    def check(self, settings: dict[str, Any]) -> None:
        """Refuse an inner loss that there is not."""
        if settings["objective"] not in ("dot", "l2"):
            raise ValueError(f"objective is {settings['objective']!r}; it can be dot or l2")

    def init_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the memory of a parameter's matrices before its first write."""
        *heads, _, columns = p.shape
        if self._hidden is None:
            return {"memory": p.new_zeros(*heads, columns, columns)}
        w2 = normal(RandomBits("memory_w2").at([range(self._hidden * columns)])).view(self._hidden, columns).to(p)
        return {
            "memory_w1": p.new_zeros(*heads, columns, self._hidden),
            "memory_w2": w2.expand(*heads, self._hidden, columns).clone(),
        }
