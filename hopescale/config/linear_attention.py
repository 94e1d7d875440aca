"""Sizes of a linear-attention mixer that follow from its config, and problems of such a config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from hopescale.common.errors import Problem
from hopescale.config.check_base import leaves_rest
from hopescale.config.model_shape import head_dim
from hopescale.config.schema import ModelConfig
from hopescale.config.schema.linear_attention import LinearAttentionConfig


@dataclass(frozen=True)
class LinearSizes:
    """Numbers and widths of a mixer over all ranks, or of a rank's share.

    Attributes:
        groups: Groups of heads that share keys and queries.
        shared_by: Heads of a group.
        key_dim: Width of a key.
        value_dim: Width of a value.
        gated: Whether there is an output gate.
        gates: Numbers per head and token that the in-projection makes: a step, a rate of writing.
    """

    groups: int
    shared_by: int
    key_dim: int
    value_dim: int
    gated: bool
    gates: tuple[str, ...]

    @classmethod
    def of(cls, model: ModelConfig, config: LinearAttentionConfig) -> LinearSizes:
        """Return the sizes over all ranks."""
        heads = config.num_heads or model.num_heads
        groups = config.key_groups or heads
        gates = ("dt",) * (config.decay == "input") + ("eta",) * (config.write == "sigmoid")
        widths = (config.key_dim or head_dim(model), config.value_dim or head_dim(model))
        return cls(groups, heads // groups, *widths, config.output_gate != "none", gates)

    @property
    def heads(self) -> int:
        """Heads."""
        return self.groups * self.shared_by

    @property
    def width(self) -> int:
        """Values of all heads side by side, the out-projection's inputs."""
        return self.heads * self.value_dim

    @property
    def group_values(self) -> int:
        """Values of a group's heads side by side."""
        return self.shared_by * self.value_dim

    @property
    def group_streams(self) -> int:
        """Width of queries, keys and values of a group, side by side, as they are convolved."""
        return 2 * self.key_dim + self.group_values

    @property
    def group_inputs(self) -> int:
        """Outputs of the in-projection for a group."""
        return sum(count * width for count, width in self.parts)

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Projections in a group's rows of the in-projection: query, key, values, output gates, numbers."""
        values, numbers = (self.shared_by, self.value_dim), (self.shared_by, 1)
        return (1, self.key_dim), (1, self.key_dim), *[values] * (1 + self.gated), *[numbers] * len(self.gates)


def linear_attention_problems(
    model: ModelConfig, config: LinearAttentionConfig, key: str, tp: int | None = None
) -> Iterator[Problem]:
    """Find settings that do not fit together, or have no effect.

    Args:
        model: Sizes that the mixer takes over.
        config: Settings of the mixer.
        key: Dotted key of its section.
        tp: Tensor-parallel ranks; None is not known yet.
    """
    heads, default = config.num_heads or model.num_heads, LinearAttentionConfig()
    groups = config.key_groups or heads
    if leaves_rest(heads, groups):
        yield Problem(f"{key}.key_groups", f"{groups} does not divide the mixer's {heads} heads")
    if tp is not None and leaves_rest(groups, tp):
        hint = "set key_groups to a multiple of it, or choose another parallel.tp"
        yield Problem(f"{key}.key_groups", f"{groups} is not a multiple of parallel.tp = {tp}", hint=hint)
    if config.conv_bias and config.conv_width is None:
        yield Problem(f"{key}.conv_bias", "has no effect: conv_width is null", hint="leave it out")
    if config.rotary and LinearSizes.of(model, config).key_dim % 2:
        yield Problem(f"{key}.rotary", f"needs an even key_dim, it is {LinearSizes.of(model, config).key_dim}")
    if config.write == "step" and config.decay != "input":
        yield Problem(f"{key}.write", f"step needs decay: input, it is {config.decay}")
    if config.erase and config.write == "step":
        hint = "set erase to false, or write to sigmoid"
        yield Problem(f"{key}.erase", "does not go with write: step, which may exceed 1", hint=hint)
    if config.erase and config.key_norm != "l2":
        yield Problem(f"{key}.erase", f"needs keys of unit length, but key_norm is {config.key_norm}")
    if config.norm == "group" and config.norm_weight == "shared":
        yield Problem(f"{key}.norm_weight", "shared needs norm: head", hint="use own or none")
    for low, high in (("a_min", "a_max"), ("step_min", "step_max")):
        if getattr(config, low) > getattr(config, high):
            message = f"{getattr(config, low):g} is above {high} = {getattr(config, high):g}"
            yield Problem(f"{key}.{low}", message)
    if config.decay != "input":
        for name in (field.name for field in fields(config) if field.name.startswith(("a_m", "step_m"))):
            if getattr(config, name) != getattr(default, name):
                message = f"has no effect: decay is {config.decay}"
                yield Problem(f"{key}.{name}", message, hint="leave it out, or set decay to input")
