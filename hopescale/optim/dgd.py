"""Delta gradient descent for linear layers: a step that also decays weights along the directions of its inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hopescale.optim.stacked import StackedOptimizer, one_by_one


def dgd_update(
    weight: Tensor, grad: Tensor, gram: Tensor, *, lr: float, weight_decay: float = 0.0, target: str = "surprise"
) -> None:
    """Take one step of delta gradient descent (Nested Learning, Eq. 56 and 57) with matrices `[..., R, C]`, in place.

        W <- (W - lr g) (I + lr S)^-1,   after  W <- (1 - lr wd) W

    This is the minimum of `1/2 E|W x - u|^2 + 1/(2 lr) |W - W_t|^2` over the tokens of a batch, with `u = -dL/dy` of
    each: `g = -E[u x^T]` and `S = E[x x^T]`, both a mean or both a sum. For a single token it is Eq. 57 exactly,

        W <- W (I - lr' x x^T) - lr' dL/dy x^T,   lr' = lr / (1 + lr |x|^2)

    and for any batch it is stable at every learning rate: an eigenvalue `s` of `S` divides the weight by `1 + lr s`.

    With `target="residual"` the target of a token is `W_t x + u` instead: what the layer says, moved along `u`. That
    minimum keeps what the weights hold along the inputs, and is as stable:

        W <- W - lr g (I + lr S)^-1

    Args:
        weight: Changed.
        grad: `g`.
        gram: `S` `[..., C, C]`, symmetric and positive semidefinite.
        lr: Learning rate.
        weight_decay: Decoupled, per unit of learning rate.
        target: `surprise` as printed, or `residual`.
    """
    weight.mul_(1 - lr * weight_decay)
    wide = torch.promote_types(weight.dtype, torch.float32)
    system = torch.eye(gram.shape[-1], dtype=wide, device=gram.device).add(gram.to(wide), alpha=lr)
    factor = torch.linalg.cholesky_ex(system).L  # a check would wait for the device; the system is positive definite

    def over_system(matrix: Tensor) -> Tensor:
        # The system is symmetric, so its transposed solution is wanted: X A = B as A X^T = B^T.
        return torch.cholesky_solve(matrix.to(wide).mT, factor).mT

    if target == "residual":
        weight.sub_(over_system(lr * grad))
    else:
        weight.copy_(over_system(weight - lr * grad))


class DGD(StackedOptimizer):
    """Delta gradient descent (Nested Learning, section 4.5) for the weights of linear layers.

    State per parameter: none. Beside its gradient a parameter has the Gram matrix of its inputs, `gram` `[C, C]` or
    `[..., C, C]`, as `optim.gram.accumulate_gram` does. Settings: `dgd_update`.
    """

    rule = staticmethod(one_by_one(dgd_update))

    def init_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return an empty state."""
        return {}

    def inputs(self, p: Tensor) -> dict[str, Tensor]:
        """Return the Gram matrix of a parameter.

        Raises:
            ValueError: If it has none of its width.
        """
        gram = getattr(p, "gram", None)
        if gram is None or gram.shape[-2:] != (p.shape[-1], p.shape[-1]):
            found = "none" if gram is None else f"one of shape {tuple(gram.shape)}"
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} needs the Gram matrix of its inputs, and has {found}"
            )
        return {"gram": gram.expand(*p.shape[:-2], -1, -1).contiguous()}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begin anew to accumulate gradients and Gram matrices."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for p in group["params"]:
                p.gram = None
