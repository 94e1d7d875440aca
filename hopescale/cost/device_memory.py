"""Device memory of each rank, by kind. Imports no torch.

The most a rank holds is the largest of a few moments of a step; docs/planning.md derives them. Activations are the
tensors that torch keeps for the backward, as the modules of `models` make them on one rank; those of mixers are counted
in `mixers`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from hopescale.config.execution import effective_recompute
from hopescale.config.layout import Layout
from hopescale.config.model_shape import block_pattern, levels_of_block, padded_vocab_size
from hopescale.config.plan import make_plan
from hopescale.config.schema import MixerConfig, ModelConfig, RunConfig
from hopescale.cost.carried import kept_between_pieces, made_again
from hopescale.cost.holdings import Holding, Holdings, Kind, gathers
from hopescale.cost.micro_batch import Activations, MicroBatch
from hopescale.cost.mixers import COSTS
from hopescale.cost.parameter import FP32, itemsize
from hopescale.cost.params import count_params
from hopescale.cost.updates import BUCKETS_UNDER_WAY, MATRIX_ELEMENTS, NODE_ELEMENTS, state_entries, sum_elements
from hopescale.ops.limits import LOGITS_AT_A_TIME

LASTING = ("weights", "gradients", "accumulators", "masters", "optimizer")
"""Kinds of memory that outlive a micro batch; `accumulators` are the gradient sums of slow levels."""
KINDS = (*LASTING, "memory states", "activations", "in flight", "logits", "workspace")
"""Kinds of memory, from what lasts longest: `in flight` is what further micro batches of a pipeline have left,
`workspace` what the moment itself computes with."""

PACK_BYTES = 1 << 26
"""Most bytes of gradients that are sent at once, if no tensor is larger."""
MATRIX_WORKSPACE = 5
"""Copies of matrices that M3 computes with where its slow memory is read anew, up to six of square ones. Other rules
take fewer."""
MOST_BLOCKS = 10_000
"""Blocks of the largest model whose parameters are listed before a run starts."""


def block_activations(
    model: ModelConfig,
    mixer: MixerConfig,
    micro: MicroBatch,
    recompute: str,
    watched: Collection[tuple[str, str]] = (),
) -> Activations:
    """Count one block with a mixer; `watched` are maps of levels, as of `Holdings`."""
    norm, inner = _norm(model, micro), _stream(model, micro) * micro.stream_share
    mixing = COSTS[mixer.kind].activations(model, mixer, micro, recompute)
    levels, level_workspace = _levels(model, micro, norm, watched)
    outside, workspace = norm + inner + levels, max(level_workspace, mixing.workspace - levels)
    if recompute == "block":
        return Activations(inner, 0, outside + mixing.kept + mixing.states + workspace)
    if recompute == "memory":
        # When the mixer is computed again, the levels are done.
        again = mixing.kept + mixing.states + mixing.workspace - levels
        return Activations(outside, 0, max(level_workspace, again))
    return Activations(outside + mixing.kept, mixing.states, workspace)


def _stream(model: ModelConfig, micro: MicroBatch) -> float:
    """Count the residual stream of all tokens."""
    return micro.tokens * model.d_model * micro.itemsize


def _norm(model: ModelConfig, micro: MicroBatch) -> float:
    """Count a norm of the stream: its input in float32, and the input scaled; a kernel keeps the input and the root."""
    if micro.fused:
        return micro.tokens * micro.stream_share * (model.d_model * micro.itemsize + FP32)
    return micro.tokens * micro.stream_share * (2 * model.d_model + 1) * FP32


def _levels(
    model: ModelConfig, micro: MicroBatch, norm: float, watched: Collection[tuple[str, str]]
) -> tuple[float, float]:
    """Count the activations that a block's levels keep, and the workspace of the widest one's backward pass.

    No kernel joins first maps whose inputs are looked at; those of the last one are looked at in float32.
    """
    stream, kept, workspace, levels = _stream(model, micro), 0.0, 0.0, levels_of_block(model, 0)
    for name, level in levels.items():
        width = level.d_ff / micro.tp * micro.tokens * micro.itemsize
        fused = micro.fused and not {(name, "gate"), (name, "up")} & set(watched)
        kept += (3 if fused else 4) * width  # gate, its activation but in a kernel, up, their product
        looks = (name, "down") in watched and micro.itemsize < FP32
        workspace = max(workspace, (1 + FP32 / micro.itemsize if looks else 2) * width)
    if model.cms.variant == "sequential":
        kept += len(levels) * (norm + stream)
    else:
        kept += norm + stream + len(levels) * stream
    return kept, workspace + stream


def _logits(model: ModelConfig, micro: MicroBatch) -> float:
    """Count logits: log-softmax, its gradient, and their own in float32; or both of their type, and pieces in float32.

    On a CPU tensor-parallel ranks overwrite one of the three.
    """
    count = micro.tokens * padded_vocab_size(model) / micro.tp
    if micro.on_gpu:
        return 2 * count * micro.itemsize + 2 * min(count, LOGITS_AT_A_TIME) * FP32
    return (3 if micro.tp == 1 else 2) * count * FP32


def head_bytes(model: ModelConfig, micro: MicroBatch) -> float:
    """Count the activations of the final norm, and the head's input."""
    return _norm(model, micro) + _stream(model, micro)


@dataclass(frozen=True)
class DeviceMemory:
    """The most that a rank of a stage holds.

    Attributes:
        bytes: Bytes by kind, at that moment.
        moment: Name of the moment: `loss`, `again` (a piece of a sequence has been run again), `backward`, `last block`
            (the first block's backward) or `update`.
        in_flight: Micro batches whose activations the rank holds at a time.
        parameters: Entries of its weights.
    """

    bytes: dict[str, float]
    moment: str
    in_flight: int
    parameters: int

    @property
    def peak(self) -> float:
        """Bytes in all."""
        return sum(self.bytes.values())


def device_memory_of_stage(
    holdings: Holdings, config: RunConfig, layout: Layout, stage: int, *, exact: bool = True
) -> DeviceMemory:
    """Return the most that a rank of a pipeline stage holds.

    Args:
        config: Micro batch, precision and recomputation, which may differ from those `holdings` was made with.
        exact: Whether shares of matrices are those of the replica that owns most, or of all on average.
    """
    holding, slices = holdings.of_stage(layout, stage), holdings.slices(layout, stage)
    owned = holdings.owned_share(layout, stage) if exact else 1 / layout.replicas
    lasting = _lasting(config, layout, holding, owned)
    waiting = layout.pp - stage
    if layout.virtual_stages > 1:
        waiting = 2 * (layout.pp - stage - 1) + (layout.virtual_stages - 1) * layout.pp + 1
    if layout.pp == 1 and layout.cp > 1:
        waiting = 2  # two are begun before the first turns back
    in_flight = min(waiting, make_plan(config, layout).grad_accumulation * layout.virtual_stages)
    moments = _moments(config, layout, holding, owned, slices, in_flight, holdings.watched)
    name = max(moments, key=lambda name: sum(moments[name].values()))
    at_peak = {kind: lasting.get(kind, 0) + moments[name].get(kind, 0) for kind in KINDS}
    return DeviceMemory(at_peak, name, in_flight, holding.total())


def least_memory(config: RunConfig, layout: Layout) -> float:
    """Return the bytes without which the fullest rank cannot train: weights, gradients and the optimizer's state.

    Of a model with more blocks than `MOST_BLOCKS`, whose parameters would take too long to list, weights alone count.
    """
    if config.model.num_layers > MOST_BLOCKS:
        weights = itemsize(config.train.precision) * count_params(config.model)["total"]
        return weights / (layout.tp * layout.pp * (layout.replicas if config.parallel.stage == 3 else 1))
    holdings, totals = Holdings(config), []
    for stage in range(layout.pp):
        holding, owned = holdings.of_stage(layout, stage), holdings.owned_share(layout, stage)
        lasting = _lasting(config, layout, holding, owned)
        totals.append(sum(lasting.values()) + _fast_gradients(config, layout, holding))
    return max(totals)


def _is_fast(config: RunConfig, kind: Kind) -> bool:
    """Tell whether parameters are updated at every step."""
    return kind.level is None or config.model.cms.levels[kind.level].update_every_steps == 1


def _lasting(config: RunConfig, layout: Layout, holding: Holding, owned: float) -> dict[str, float]:
    """Count the bytes that a rank holds all the time, after sharding over replicas."""
    zero, dp, joined = config.parallel.stage, layout.replicas, gathers(config, layout)
    wait_on = layout.node_replicas or (dp if zero > 1 else 1)
    result = dict.fromkeys(LASTING, 0.0)
    for kind, entries in holding.entries.items():
        matrix, bytes_ = kind.rule != "adamw", FP32 * entries
        share = owned if matrix else 1 / dp if zero else 1.0
        result["weights"] += kind.itemsize * _kept_weights(config, layout, holding, kind, owned)
        result["optimizer"] += FP32 * holding.state[kind] * share
        own_master = kind.itemsize < FP32 or (not matrix and zero == 2) or (matrix and joined)
        result["masters"] += bytes_ * share * own_master
        summed = bytes_ + FP32 * holding.grams[kind]
        if not _is_fast(config, kind) or (layout.flushes and not matrix):
            late = kind.level is not None and config.model.cms.levels[kind.level].lag > 0
            result["accumulators"] += (summed + late * bytes_) / wait_on
        if matrix and _keeps_sums(config, layout, kind):
            result["gradients"] += summed
    return result


def _kept_weights(config: RunConfig, layout: Layout, holding: Holding, kind: Kind, owned: float) -> float:
    """Count the weights of a kind that a rank keeps: its part at ZeRO 3, and where a node shares out those of blocks.

    There an owner of matrices keeps its own beside.
    """
    entries = holding.entries[kind]
    if not (config.parallel.shares_weights and layout.node_replicas):
        return entries / (layout.replicas if config.parallel.stage == 3 else 1)
    shared = entries - holding.outside[kind]
    return holding.outside[kind] + shared / layout.node_replicas + (kind.rule != "adamw") * shared * owned


def _keeps_sums(config: RunConfig, layout: Layout, kind: Kind) -> bool:
    """Tell whether whole gradient sums of matrices last beside waiting ones: with nodes, those of `dgd`."""
    return kind.rule == "dgd" if layout.node_replicas else _is_fast(config, kind)


def _fast_gradients(config: RunConfig, layout: Layout, holding: Holding) -> float:
    """Count the gradient sums that are made anew at each step: those of AdamW's parameters of period 1.

    With nodes all are, but for those of matrices whose sums last; of AdamW's parameters a flat tensor of each set, or
    those of a block at a time if its weights are shared out.
    """
    if layout.flushes:
        room = max(NODE_ELEMENTS, holding.largest)
        made = {kind: count for kind, count in holding.entries.items() if not _keeps_sums(config, layout, kind)}
        if config.parallel.shares_weights:
            blocks = config.model.num_layers
            for kind, count in made.items():
                if kind.rule == "adamw":
                    apart = holding.outside[kind]
                    made[kind] = min(apart, room) + (count - apart) / blocks
            return FP32 * sum(made.values())
        return FP32 * sum(min(count, room) if kind.rule == "adamw" else count for kind, count in made.items())
    if layout.node_replicas:
        made = (kind for kind in holding.entries if not _keeps_sums(config, layout, kind))
    else:
        made = (kind for kind in holding.entries if kind.rule == "adamw" and _is_fast(config, kind))
    return FP32 * sum(holding.entries[kind] for kind in made) / (layout.replicas if config.parallel.stage > 1 else 1)


def _update_workspace(config: RunConfig, layout: Layout, holding: Holding, owned: float) -> float:
    """Count the workspace of an update of everything: the weights before it, to compare, and what rules compute with.

    AdamW computes in the place of gradients; DeepSpeed's, of stages 2 and 3, with roots and copies of them. Rules for
    matrices update some of what a replica owns at a time.
    """
    dp = layout.replicas
    elementwise = sum(count for kind, count in holding.entries.items() if kind.rule == "adamw")
    in_levels = sum(count for kind, count in holding.entries.items() if kind.level)
    copied = 2 * elementwise if config.parallel.stage > 1 else 0
    workspace = (copied + in_levels) / dp if config.parallel.stage else in_levels
    copies, matrices = MATRIX_WORKSPACE + _kept_for_bad_steps(config, holding), holding.total() - elementwise
    workspace += copies * min(max(MATRIX_ELEMENTS, holding.largest_matrix), owned * matrices)
    if gathers(config, layout) and matrices:
        # Gradients of wholes, and their Gram matrices, beside the sums of slices.
        wholes = min(max(MATRIX_ELEMENTS, owned * holding.largest_class), owned * matrices)
        workspace += wholes * (1 + sum(holding.grams.values()) / matrices)
    return max(FP32 * workspace, _sums_under_way(config, layout, holding))


def _kept_for_bad_steps(config: RunConfig, holding: Holding) -> float:
    """Count the copies of a matrix that its update keeps, to put back after a bad step: the weight, and its state."""
    side = 1 << 10
    rules = {kind.rule for kind in holding.entries} - {"adamw"}
    return max((1 + state_entries(rule, (side, side), config.optim) / side**2 for rule in rules), default=0.0)


def _sums_under_way(config: RunConfig, layout: Layout, holding: Holding) -> float:
    """Count the copies of gradients that are summed over replicas at once."""
    elementwise = sum(count for kind, count in holding.entries.items() if kind.rule == "adamw")
    count, room = (1, PACK_BYTES) if config.parallel.stage else (BUCKETS_UNDER_WAY, FP32 * sum_elements(elementwise))
    copies = min(count * max(room, FP32 * holding.largest), FP32 * holding.total())
    return copies if layout.replicas > 1 else 0.0


def _moments(
    config: RunConfig,
    layout: Layout,
    holding: Holding,
    owned: float,
    slices: list[range],
    in_flight: int,
    watched: Collection[tuple[str, str]],
) -> dict[str, dict[str, float]]:
    """Count the bytes that a rank holds by moment and kind, beside lasting ones."""
    model, micro = config.model, MicroBatch.of(config.train, layout)
    several, is_last = make_plan(config, layout).grad_accumulation > 1, slices[-1].stop == model.num_layers
    pattern = block_pattern(model)
    names = [pattern[number] for each in slices for number in each]
    with_mixer = {
        name: block_activations(model, mixer, micro, effective_recompute(config, mixer), watched)
        for name, mixer in model.mixers.items()
        if name in names
    }
    blocks = [with_mixer[name] for name in names]
    states, one = (sum(getattr(each, part) for each in blocks) / len(slices) for part in ("states", "kept"))
    numbers = [number for each in slices for number in each]
    states += kept_between_pieces(config, layout, numbers) / len(slices)
    # The block that needs most when its turn comes counts as the last one.
    block = max(blocks, key=lambda each: each.kept + each.states + each.workspace)
    if layout.pp > 1:
        one += 2 * _stream(model, micro) * micro.stream_share
    kept = {"activations": one, "memory states": states, "in flight": (in_flight - 1) * (one + states)}
    head = {"activations": one + head_bytes(model, micro), "logits": _logits(model, micro)}
    vocabulary = padded_vocab_size(model) * model.d_model * micro.itemsize
    workspace = max(each.workspace for each in blocks) + _gathered(config, holding, vocabulary)
    if model.tie_embeddings and is_last and slices[0].start == 0:
        workspace += vocabulary / layout.tp  # the embedding's gradient, of the head
    # The last block's backward makes gradients beside the sums of those before it.
    widest = max(model.d_model, *(level.d_ff for level in model.cms.levels.values()))
    fresh = micro.itemsize * widest * model.d_model / layout.tp * several
    if config.train.segments > 2:  # gradients of weights are added up, in their type, until the first piece's are there
        fresh = holding.weight_bytes()
    gradients = _fast_gradients(config, layout, holding)
    early = (
        _sums_under_way(config, layout, holding) if config.parallel.stage == 0 and layout.pp == layout.cp == 1 else 0
    )
    return {
        "loss": kept | (head if is_last else {}) | {"gradients": gradients * several},
        "again": kept | {"workspace": made_again(config, layout, numbers) + fresh, "gradients": gradients * several},
        "backward": kept | {"workspace": workspace + fresh, "gradients": gradients * several},
        "last block": {
            "activations": block.kept,
            "memory states": block.states,
            "workspace": workspace + early,
            "gradients": gradients,
        },
        "update": {"gradients": gradients, "workspace": _update_workspace(config, layout, holding, owned)},
    }


def _gathered(config: RunConfig, holding: Holding, vocabulary: float) -> float:
    """Count the buffers of gradients at ZeRO 2, and the weights that ZeRO 3 makes whole: two blocks, and the others.

    A node that shares weights out makes those of two blocks whole.
    """
    zero = config.parallel.stage
    if config.parallel.shares_weights:
        outside = sum(kind.itemsize * count for kind, count in holding.outside.items())
        return 2 * (holding.weight_bytes() - outside) / config.model.num_layers
    bucket = min(PACK_BYTES, FP32 * holding.total()) if zero > 1 else 0.0
    return bucket + (2 * holding.weight_bytes() / config.model.num_layers + vocabulary if zero == 3 else 0.0)
