"""Delta gradient descent for linear layers: a step that also decays weights along the directions of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hopescale.optim.stacked import StackedOptimizer, settings


class InputGram:
    """Gather the Gram matrix of a linear layer's inputs during its training forward passes.

    `total` and `tokens` add up over micro batches and over steps until `clear`, and over ranks that see different
    tokens. A forward pass that is recomputed counts twice in both, which leaves `mean` as it is.

    Args:
        layer: With a `weight` `[R, c]`. Its first positional argument is the input `[..., c]`.
        columns: Width `C` of the whole input; None is `c`.
        gather: Makes the input whole, `[..., C]`, where ranks hold slices of it (row-parallel layers); called in every
            training forward pass by all of them. None takes the input as it comes.
        unit: Whether inputs are scaled to unit length first.

    Attributes:
        total: Sum of `x x^T`, float32 `[C, C]`.
        tokens: Number of inputs, 0-dim float32.
    """

    def __init__(
        self,
        layer: nn.Module,
        *,
        columns: int | None = None,
        gather: Callable[[Tensor], Tensor] | None = None,
        unit: bool = False,
    ):
        self.gather, self.unit = gather, unit
        columns, device = columns or layer.weight.shape[-1], layer.weight.device
        self.total = torch.zeros(columns, columns, device=device)
        self.tokens = torch.zeros((), device=device)
        self._handle = layer.register_forward_pre_hook(self._see)

    def _see(self, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not (layer.training and torch.is_grad_enabled()):
            return
        x = inputs[0].detach()
        x = (x if self.gather is None else self.gather(x)).flatten(0, -2).float()  # [tokens, C]
        if self.unit:
            x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        self.total.addmm_(x.mT, x)
        self.tokens += x.shape[0]

    def mean(self) -> Tensor:
        """Return the mean of `x x^T` per token `[C, C]`; zeros if no token was seen."""
        return self.total / self.tokens.clamp_min(1.0)

    def clear(self) -> None:
        """Begin again."""
        self.total.zero_()
        self.tokens.zero_()

    def remove(self) -> None:
        """See no further input."""
        self._handle.remove()


def dgd_update(weight: Tensor, grad: Tensor, gram: Tensor, *, lr: float, weight_decay: float = 0.0) -> None:
    """Take one step of delta gradient descent (Nested Learning, Eq. 56 and 57) with matrices `[..., R, C]`, in place.

        W <- (W - lr g) (I + lr S)^-1,   after  W <- (1 - lr wd) W

    This is the minimum of `1/2 E|W x - u|^2 + 1/(2 lr) |W - W_t|^2` over the tokens of a batch, with `u = -dL/dy` of
    each: `g = -E[u x^T]` and `S = E[x x^T]`, both a mean or both a sum. For a single token it is Eq. 57 exactly,

        W <- W (I - lr' x x^T) - lr' dL/dy x^T,   lr' = lr / (1 + lr |x|^2)

    and for any batch it is stable at every learning rate: an eigenvalue `s` of `S` divides the weight by `1 + lr s`.

    Args:
        weight: Changed.
        grad: `g`.
        gram: `S` `[..., C, C]`, symmetric and positive semidefinite.
        lr: Learning rate.
        weight_decay: Decoupled, per unit of learning rate.
    """
    weight.mul_(1 - lr * weight_decay)
    wide = torch.promote_types(weight.dtype, torch.float32)
    system = torch.eye(gram.shape[-1], dtype=wide, device=gram.device).add(gram.to(wide), alpha=lr)
    # The system is symmetric, so its transposed solution is wanted: X A = B as A X^T = B^T.
    right = (weight - lr * grad).to(wide)
    weight.copy_(torch.cholesky_solve(right.mT, torch.linalg.cholesky(system)).mT)


class DGD(StackedOptimizer):
    """Delta gradient descent (Nested Learning, section 4.5) for the weights of linear layers.

    State per parameter: none. A step uses the mean Gram matrix of the inputs since the last one, and clears it.

    Args:
        params: Weights `[..., R, C]`.
        lr: Learning rate.
        weight_decay: Decoupled, per unit of learning rate.
        grams: Of every parameter, that of its layer's inputs; with the loss a mean over tokens. Layers with one input
            may share one.

    Raises:
        ValueError: If a parameter is no matrix, or has no Gram matrix of its width.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        grams: Mapping[Tensor, InputGram],
    ):
        self.grams = grams
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def init_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return an empty state, after a check of the Gram matrix."""
        gram = self.grams.get(p)
        if gram is None or gram.total.shape[-1] != p.shape[-1]:
            found = "none" if gram is None else f"one of width {gram.total.shape[-1]}"
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} needs the Gram matrix of its inputs, and has {found}"
            )
        return {}

    def inputs(self, p: Tensor) -> dict[str, Tensor]:
        """Return the mean Gram matrix since the last step."""
        return {"gram": self.grams[p].mean().expand(*p.shape[:-2], -1, -1).contiguous()}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient, once, and clear its Gram matrix."""
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.grams[p].clear()
        return loss

    def update(
        self, group: dict[str, Any], weight: Tensor, grad: Tensor, state: dict[str, Tensor], step: int | None
    ) -> None:
        """Update a stack in place."""
        dgd_update(weight, grad, **state, **settings(group))
