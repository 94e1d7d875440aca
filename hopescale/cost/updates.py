"""Cost of a parameter's update by its rule, and the owner of each matrix: parts of equal cost, equal shapes together.

Imports no torch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hopescale.config.schema import DeepMomentumConfig, M3Config, MuonConfig, OptimConfig
from hopescale.config.schema.optim import Blocks
from hopescale.ops.limits import steps_on_gram

Wire = Literal["fp32", "bf16", "int8", "int4"]
"""Types in which replicas send sums of gradients."""
WIRE_BLOCK = 64
"""Entries that share a float32 scale in sums of integers."""
Parts = tuple[tuple[int, int], ...]

BUCKET_ELEMENTS = 1 << 24
"""Most entries of gradients that replicas exchange at once, where nothing else is said."""
SUM_PIECES, SUM_ELEMENTS = 20, 1 << 26
"""Buckets into which gradients are cut at `zero` 0, and most entries of one, if no parameter has more."""
BUCKETS_UNDER_WAY = 2
"""Buckets of gradients that are summed at once at `zero` 0: each is a copy."""
EVEN_UNIT = 8
"""Entries of which a replica's part of a flat tensor is a multiple: 16 bytes of bfloat16."""
EVEN_PIECES, EVEN_ELEMENTS = 10, 1 << 20
"""Pieces of a model into which flat tensors of ZeRO 1 are cut, and the entries below which none is."""
MATRIX_PIECES = 8
"""Pieces of all matrices into which their flat tensors are cut, of `EVEN_ELEMENTS` entries at least."""
NODE_ELEMENTS = 1 << 26
"""Most entries of a flat tensor whose gradients replicas of a node sum as soon as they are there, if no parameter has
more."""
MATRIX_ELEMENTS = 1 << 25
"""Most entries that a rule for matrices updates at once, if no matrix has more: it computes with copies."""
ENTRY_COST = 64
"""FLOPs that take as long as reading and writing an entry of weight, gradient and state: its part of an update that no
matrix product is part of."""
ORTHOGONAL_STEPS = {"newton_schulz": 5, "polar_express": 4}
"""Iterations of each method of `optim.*.orthogonalize`, unless `ns_steps` is given."""
DEEP_MEMORY_DIM = 32
"""Hidden width of deep momentum's MLP memory that is given none."""


def update_cost(rule: str, shape: Sequence[int], config: OptimConfig, parts: Parts = ()) -> float:
    """Return the cost of an update of a parameter `[..., R, C]` by a rule for matrices, in FLOPs.

    `parts` are the projections that it fuses, as in `ParameterSpec`.
    """
    return update_flops(rule, shape, config, parts) + ENTRY_COST * math.prod(shape)


def update_flops(rule: str, shape: Sequence[int], config: OptimConfig, parts: Parts = ()) -> float:
    """Return the FLOPs of matrix products in an update of a parameter `[..., R, C]`; none with AdamW."""
    if rule == "adamw":
        return 0
    *heads, rows, columns = shape
    if rule == "delta_momentum":
        flops = 4 * rows * columns * min(rows, columns)
    elif rule == "deep_momentum":
        linear = config.deep_momentum.memory == "linear"
        width = columns if linear else deep_memory_dim(config.deep_momentum)
        flops = (6 if linear else 14) * rows * columns * width
    elif rule == "dgd":
        flops = columns**3 / 3 + 2 * rows * columns * columns
    else:
        settings = config.muon if rule == "muon" else config.m3
        flops = sum(
            count * orthogonal_flops(height, columns, settings)
            for count, height in block_rows(rows, parts, settings.blocks)
        )
        if rule == "m3" and config.m3.alpha_slow:
            flops *= 1 + 1 / config.m3.frequency
    return math.prod(heads) * flops


def block_rows(rows: int, parts: Parts, blocks: Blocks) -> list[tuple[int, int]]:
    """Return the matrices that a rule sees in one of so many rows: of each kind how many, and their rows."""
    if blocks == "matrix" or not parts:
        return [(1, rows)]
    groups = rows // sum(count * width for count, width in parts)
    if blocks == "projections":
        return [(1, groups * count * width) for count, width in parts]
    return [(groups * count, width) for count, width in parts]


def orthogonal_flops(rows: int, columns: int, settings: MuonConfig | M3Config) -> int:
    """Return the FLOPs of making one matrix orthogonal, in bf16 unless `ns_dtype` says otherwise.

    Steps on one Gram matrix, `r` of them, take `4 s^2 l + (4 r - 3) 2 s^3`, with `s` the shorter and `l` the longer
    side: the Gram matrix and the product with what it has become; and of the Gram matrix its square and, from the
    second step on, three products.
    """
    short, long, steps = min(rows, columns), max(rows, columns), settings.ns_steps
    steps, together = ORTHOGONAL_STEPS[settings.orthogonalize] if steps is None else steps, 1
    if settings.orthogonalize == "polar_express":
        together = steps_on_gram(rows, columns, steps, low_precision=settings.ns_dtype != "fp32")
    parts = math.ceil(steps / together)
    return parts * 4 * short**2 * long + (4 * steps - 3 * parts) * 2 * short**3


def deep_memory_dim(settings: DeepMomentumConfig) -> int:
    """Return the hidden width of deep momentum's MLP memory."""
    return settings.memory_dim or DEEP_MEMORY_DIM


def state_entries(rule: str, shape: Sequence[int], config: OptimConfig) -> int:
    """Count the float32 entries of a rule's state for a parameter (`[..., R, C]`, of matrices), counters left out."""
    entries = math.prod(shape)
    if rule == "adamw":
        return 2 * entries
    if rule == "m3":
        return entries * (1 + 2 * bool(config.m3.alpha_slow) + config.m3.second_moment)
    if rule == "delta_momentum":
        return entries * (1 if config.delta_momentum.beta2 is None else 2)
    if rule == "deep_momentum":
        *heads, _, columns = shape
        linear = config.deep_momentum.memory == "linear"
        width = columns if linear else 2 * deep_memory_dim(config.deep_momentum)
        return math.prod(heads) * columns * width
    return 0 if rule == "dgd" else entries


def wire_bytes(entries: int, wire: Wire) -> int:
    """Return the bytes of a row of so many entries on the wire."""
    if wire in ("fp32", "bf16"):
        return entries * (4 if wire == "fp32" else 2)
    return math.ceil(entries / WIRE_BLOCK) * (WIRE_BLOCK * (8 if wire == "int8" else 4) // 8 + 4)


@dataclass(frozen=True)
class Work:
    """The update of the parameter of a name."""

    name: str
    cost: float
    """Cost in any unit."""
    shape: Hashable
    """Key of the batch in which it is updated, with others of the same shape."""
    due: Hashable = None
    """Key of what is due together, such as a cadence: it is distributed evenly by itself."""


def assign_owners(work: Sequence[Work], owners: int) -> dict[str, int]:
    """Give each parameter to an owner, the same on every rank that asks.

    What is due together is distributed by itself, costly shapes first, so that every step is balanced. Of equal shapes
    an owner takes a run at a time: its part of them, so that state is balanced too, as far as its share of the cost
    has room. No owner has more than the mean and the largest single cost.

    Returns:
        The owner of each parameter, from 0.
    """
    together: dict[Hashable, list[Work]] = defaultdict(list)
    for each in work:
        together[each.due].append(each)
    total, result = [0.0] * owners, {}
    for members in together.values():
        load = [0.0] * owners
        fair = sum(each.cost for each in members) / owners
        classes: dict[tuple, list[Work]] = defaultdict(list)
        for each in members:
            classes[each.shape, each.cost].append(each)
        for alike in sorted(classes.values(), key=lambda alike: -alike[0].cost):
            part = math.ceil(len(alike) / owners)
            while alike:
                owner = min(range(owners), key=lambda i: (load[i], total[i], i))
                count = max(1, min(part, int((fair - load[owner]) / alike[0].cost * (1 + 1e-9))))
                for each in alike[:count]:
                    result[each.name] = owner
                    load[owner] += each.cost
                    total[owner] += each.cost
                alike = alike[count:]
    return result


def sum_elements(whole: int) -> int:
    """Return the most entries of a bucket of gradients at `zero` 0, of a model with so many entries."""
    return min(max(BUCKET_ELEMENTS, math.ceil(whole / SUM_PIECES)), SUM_ELEMENTS)


def even_sets(sizes: Mapping[str, int], whole: int) -> list[list[str]]:
    """Cut parameters that are updated together into sets that a backward pass completes one after the other.

    A large parameter that it completes last is alone, so that all others are on their way by then.

    Args:
        sizes: Entries of the parameters, in the order of the model.
        whole: Entries of all parameters of the model.
    """
    room = max(EVEN_ELEMENTS, math.ceil(whole / EVEN_PIECES))
    first = next(iter(sizes))
    alone = [first] if sizes[first] > room / 4 and len(sizes) > 1 else []
    others = [name for name in reversed(sizes) if name not in alone]
    sets = buckets(others, dict.fromkeys(others, 0), sizes, room)
    # Within a set the order is that of the model.
    return [names[::-1] for names in sets] + ([alone] if alone else [])


def matrix_sets(sizes: Mapping[str, int], whole: int) -> list[list[str]]:
    """Cut matrices that are updated together into sets that a backward pass completes one after the other.

    Args:
        sizes: Entries of the matrices, in the order of the model.
        whole: Entries of all matrices of the model.
    """
    return buckets(
        reversed(sizes), dict.fromkeys(sizes, 0), sizes, max(EVEN_ELEMENTS, math.ceil(whole / MATRIX_PIECES))
    )


def buckets(names: Iterable[str], owners: Mapping[str, int], sizes: Mapping[str, int], room: int) -> list[list[str]]:
    """Cut parameters into buckets in which every owner's part has about the same size.

    An owner's part of a bucket has room for so many entries, which a single parameter may exceed.
    """
    result: list[list[str]] = []
    place: dict[int, tuple[int, int]] = {}
    for name in names:
        index, used = place.get(owners[name], (0, 0))
        if used and used + sizes[name] > room:
            index, used = index + 1, 0
        place[owners[name]] = index, used + sizes[name]
        if index == len(result):
            result.append([])
        result[index].append(name)
    return result
