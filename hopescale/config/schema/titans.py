"""Titans' compositions of a memory with attention and persistent tokens (arXiv 2501.00663, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hopescale.config.schema.mixers import SelfModifyingConfig
from hopescale.config.schema.ranges import Count, Fraction


@dataclass(frozen=True)
class TitansConfig(SelfModifyingConfig):
    """A memory, attention and persistent tokens. Keys of the memory are those of `self_modifying`; the defaults are
    the published memory's, which has static maps."""

    kind: Literal["titans"] = "titans"
    """Kind of the mixer."""
    composition: Literal["mac", "mag", "mal"] = "mac"
    """`mac`: attention reads segments of `chunk_size` tokens and what the memory knew before each; its answers are
    written. `mag`: memory and sliding-window attention side by side, one gating the other. `mal`: sliding-window
    attention over what the memory answers."""
    persistent_tokens: Count = 16
    """Learned tokens in front of every document, or with `mac` of every segment."""
    window: Count | None = None
    """Tokens that a token of attention sees, itself included; null is all up to it. With `mac` null, as the segment is
    the window."""
    adaptive: tuple[Literal["k", "v", "eta", "alpha"], ...] = ()
    """Empty: keys and values are static maps."""
    targets: Literal["self", "value"] = "value"
    """`value`: the target is the value `v_t` itself. `self`: the memory makes its own target from the value."""
    inner_rule: Literal["dgd", "gd"] = "gd"
    """`gd`: plain gradient descent, no erase. `dgd`: a write first erases what its key held."""
    momentum_write: Literal["averaged", "whole"] = "whole"
    """How much of a write enters the momentum. `whole`: all of it (Eq. 14). `averaged`: `1 - mu` of it. Only with
    `momentum`."""
    read: Literal["prefix", "inclusive", "boundary"] = "inclusive"
    """State that token t reads: after its own write, before it, or at the start of its chunk."""
    eta_init: Fraction = 0.005
    """Inner learning rate of every token at initialisation, as a fraction of `eta_max`, in (0, 1)."""
    normalize_writes: bool | None = False
    """Whether a write is divided by the square of what its layer amplifies an error by, where that is above 1. False is
    the published memory. True only with `memory: mlp`."""
