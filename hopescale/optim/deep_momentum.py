"""Deep momentum: the momentum is a network that learns the gradient's rows while it is asked for the update."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from hopescale.cost.updates import DEEP_MEMORY_DIM
from hopescale.ops.draws import RandomBits, normal
from hopescale.optim.muon import scale_to_rms
from hopescale.optim.stacked import StackedOptimizer, one_by_one


def deep_momentum_update(
    weight: Tensor,
    grad: Tensor,
    memory: Tensor | None = None,
    memory_w1: Tensor | None = None,
    memory_w2: Tensor | None = None,
    *,
    lr: float,
    alpha: float = 0.9,
    inner_lr: float = 0.01,
    objective: Literal["dot", "l2"] = "dot",
    update_rms: float | None = None,
    weight_decay: float = 0.0,
) -> None:
    """Take one step of deep momentum, DMGD (Nested Learning, Eq. 50), with matrices `[..., R, C]`, in place.

    A row `g_i = s_i u_i` of the gradient has length `s_i` and direction `u_i`, which is key and target at once:

        inner loss   L = -<m(u_i), u_i>  (dot)   or   1/2 |m(u_i) - u_i|^2  (l2),   summed over rows
        memory       m(u) = u + W1 tanh(W2 u)    or   m(u) = A u
        write        phi <- alpha phi - inner_lr dL/dphi,   phi = W1, W2 or A
        read         W_i <- (1 - lr wd) W_i - lr s_i m(u_i),   with the memory just written

    tanh is odd: the opposite gradient gives the opposite update. Rows of zeros write nothing.

    Args:
        weight: Changed.
        grad: Gradient.
        memory: `A` `[..., C, C]` of a linear memory, changed; None for an MLP.
        memory_w1: `W1` `[..., C, E]`, changed.
        memory_w2: `W2` `[..., E, C]`, changed.
        lr: Learning rate.
        alpha: Retention of the memory per update.
        inner_lr: Inner learning rate, for a loss that is summed over rows.
        objective: Inner loss, `dot` or `l2`.
        update_rms: Scale each matrix of updates to this root mean square; None leaves rows as long as read.
        weight_decay: Decoupled, per unit of learning rate.
    """
    length = torch.linalg.vector_norm(grad, dim=-1, keepdim=True)  # [..., R, 1]
    u = grad / length.clamp_min(torch.finfo(grad.dtype).tiny)
    target = u if objective == "l2" else None
    if memory is not None:
        error = -u if target is None else u @ memory.mT - target
        memory.mul_(alpha).sub_(error.mT @ u, alpha=inner_lr)
        answer = u @ memory.mT
    else:
        hidden = torch.tanh(u @ memory_w2.mT)  # [..., R, E]
        error = -u if target is None else hidden @ memory_w1.mT
        inner = (error @ memory_w1) * (1 - hidden.square())
        memory_w1.mul_(alpha).sub_(error.mT @ hidden, alpha=inner_lr)
        memory_w2.mul_(alpha).sub_(inner.mT @ u, alpha=inner_lr)
        answer = u + torch.tanh(u @ memory_w2.mT) @ memory_w1.mT
    update = answer.mul_(length)
    if update_rms is not None:
        scale_to_rms([update], update_rms)
    weight.mul_(1 - lr * weight_decay).sub_(update, alpha=lr)


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

    rule = staticmethod(one_by_one(deep_momentum_update))

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
