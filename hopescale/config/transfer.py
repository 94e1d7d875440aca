"""Growth of a model beyond the one whose learning rate was tuned, and its effect on the forward pass."""

from __future__ import annotations

from typing import Literal, get_args

from hopescale.config.model_shape import head_dim, self_modifying_mixers
from hopescale.config.schema import ModelConfig

Size = Literal["width", "head", "memory", "one"]
"""What the size of a dimension is. `width`: of the residual stream, and all that grows in proportion to it: heads side
by side, levels. `head`: of one head. `memory`: the hidden width of an MLP memory. `one`: always 1."""


def growth(model: ModelConfig) -> dict[Size, float]:
    """Return the ratio of each kind of size to that at the base width; 1 without `model.transfer`."""
    transfer, own = model.transfer, head_dim(model)
    if transfer is None:
        return dict.fromkeys(get_args(Size), 1.0)
    head = own / (transfer.base_head_dim or own)
    set_dims = [mixer.memory_dim for mixer in self_modifying_mixers(model).values() if mixer.memory == "mlp"]
    memory = 1.0 if set_dims and None not in set_dims else head
    return {"width": model.d_model / transfer.base_width, "head": head, "memory": memory, "one": 1.0}


def base_width(model: ModelConfig) -> int:
    """Return the width whose initial final norm the model has: its own without `model.transfer`."""
    return model.d_model if model.transfer is None else model.transfer.base_width


def logit_multiplier(model: ModelConfig) -> float:
    """Return the factor on the output of the final norm: `base_width / d_model`."""
    return 1 / growth(model)["width"]


def attention_scale(model: ModelConfig) -> float | None:
    """Return the factor on products of queries and keys; None is the usual `head_dim ** -0.5`.

    Heads that have grown have `base_head_dim ** 0.5 / head_dim`: queries and keys that have learned of each other
    have products that grow with the head dim, not with its root.
    """
    head = growth(model)["head"]
    return None if head == 1 else (head_dim(model) * head) ** -0.5
