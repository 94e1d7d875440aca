"""Checks of `parallel`. A degree that is null is looked at once the layout is known."""

from __future__ import annotations

from collections.abc import Iterator

from hopescale.common.errors import Problem
from hopescale.config.check_base import Check, Origins, leaves_rest, set_keys
from hopescale.config.layout import AXES
from hopescale.config.model_shape import VOCAB_MULTIPLE, attention_mixers, padded_vocab_size
from hopescale.config.schema import RunConfig


def degrees(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """One degree at most is open; only what replicas share is sharded; the first step may take longer than others."""
    parallel, zero, pp = config.parallel, config.parallel.zero, config.parallel.pp
    is_one = parallel.dp == parallel.cp == 1
    unset = [axis for axis in AXES if getattr(parallel, axis) is None]
    if len(unset) > 1:
        hint = "null is what remains of the ranks; set the others"
        yield Problem("parallel", f"{' and '.join(unset)} are null, at most one may be", hint=hint)
    if zero >= 1 and is_one:
        hint = "set parallel.zero=0, or run more replicas"
        yield Problem("parallel.zero", f"{zero} has no effect: parallel.dp is {parallel.dp}", hint=hint)
    if parallel.shard is not None and zero > parallel.stage:
        message = f"{parallel.shard}, but parallel.zero is {zero}: both say what replicas share out"
        yield Problem("parallel.shard", message, hint="set one of them alone")
    if parallel.shard == "all" and is_one:
        hint = "leave it out, or run more replicas"
        yield Problem("parallel.shard", f"all has no effect: parallel.dp is {parallel.dp}", hint=hint)
    if zero >= 2 and pp is not None and pp > 1:
        message = f"{zero} needs parallel.pp of 1, it is {pp}"
        yield Problem("parallel.zero", message, hint="with a pipeline, 1 is the most")
    first, later = parallel.first_step_timeout_s, parallel.timeout_s
    if 0 < first < later:
        hint = "set it to that at least"
        yield Problem("parallel.first_step_timeout_s", f"{first} is below parallel.timeout_s = {later}", hint=hint)


def nodes_share_evenly(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A node holds whole layers, as many replicas as every other, and more than one; there are several."""
    parallel, key = config.parallel, "parallel.ranks_per_node"
    per_node, tp = parallel.ranks_per_node, parallel.tp
    if parallel.shard != "node":
        for name in set_keys(config, origins, key):
            yield Problem(
                name, f"{per_node} has no effect: parallel.shard is {parallel.shard or 'null'}", hint="leave it out"
            )
        return
    if tp is None or min(per_node, tp) < 1:
        return
    if leaves_rest(per_node, tp) or per_node == tp:
        message = f"{per_node} ranks hold {per_node / tp:g} replicas, as parallel.tp is {tp}"
        yield Problem(key, f"{message}: parallel.shard = node needs 2 or more", hint="change either, or the other key")
        return
    if parallel.dp is None:
        return
    replicas, inside = parallel.dp * parallel.cp, per_node // tp
    if leaves_rest(replicas, inside) or replicas <= inside:
        message = f"node needs two nodes or more of {inside} replicas each ({key} {per_node} / parallel.tp {tp})"
        message += f", and parallel.dp * parallel.cp is {replicas}"
        yield Problem("parallel.shard", message, hint="set parallel.shard=all, or another number of ranks")


def weights_are_shared_by_replicas(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Weights are gathered for whole blocks, each of which runs once in a pass of a replica that is one rank."""
    parallel, train, key = config.parallel, config.train, "parallel.shard_weights"
    if not parallel.shard_weights:
        return
    if parallel.shard != "node":
        message = f"true has no effect: parallel.shard is {parallel.shard or 'null'}"
        yield Problem(key, message, hint="set parallel.shard=node, or leave it out")
    degrees = {f"parallel.{axis}": getattr(parallel, axis) for axis in ("tp", "pp", "cp")}
    for name, degree in (degrees | {"train.segments": train.segments}).items():
        if degree is not None and degree > 1:
            yield Problem(key, f"true needs {name} of 1, it is {degree}", hint="change either")
    if train.compile:
        yield Problem(key, "true, but compiled chunks may hold weights that are freed", hint="set train.compile=false")
    if config.log.samples:
        message = "needs a rank that holds the whole model, but parallel.shard_weights is true"
        yield Problem("log.samples", message, hint="leave it empty")


def tensor_parallel_ranks_share_evenly(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Heads, level widths, rows of the embedding and tokens between layers are distributed evenly."""
    tp, model, seq_len = config.parallel.tp or 1, config.model, config.train.seq_len
    if config.parallel.sequence_parallel and config.parallel.tp == 1:
        hint = "leave it off, or raise parallel.tp"
        yield Problem("parallel.sequence_parallel", f"needs parallel.tp of 2 or more, it is {tp}", hint=hint)
    if config.parallel.sequence_parallel and leaves_rest(seq_len, tp):
        message = f"{seq_len} is not a multiple of parallel.tp = {tp}, which sequence_parallel needs"
        yield Problem("train.seq_len", message)
    sizes = {"model.num_heads": model.num_heads}
    for name, mixer in attention_mixers(model).items():
        if mixer.num_kv_heads is not None:
            sizes[f"model.mixers.{name}.num_kv_heads"] = mixer.num_kv_heads
    sizes |= {f"model.cms.levels.{name}.d_ff": level.d_ff for name, level in model.cms.levels.items()}
    for key, size in sizes.items():
        if leaves_rest(size, tp):
            yield Problem(key, f"{size} is not a multiple of parallel.tp = {tp}", hint="change either")
    rows = padded_vocab_size(model)
    if leaves_rest(rows, tp):
        padded = f"{model.vocab_size}, padded to a multiple of {VOCAB_MULTIPLE}, is {rows}"
        yield Problem("model.vocab_size", f"{padded}: not a multiple of parallel.tp = {tp}", hint="change either")


def stages(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A stage and each slice of one hold a block, and micro batches interleave in groups of as many as stages."""
    parallel, train, layers = config.parallel, config.train, config.model.num_layers
    pp, slices = parallel.pp or 1, parallel.virtual_stages
    if slices > 1 and parallel.pp == 1:
        message = f"{slices} needs parallel.pp of 2 or more, it is {pp}"
        yield Problem("parallel.virtual_stages", message, hint="leave it at 1, or raise parallel.pp")
    if 0 < layers < pp * slices:
        product = f"parallel.pp * parallel.virtual_stages = {pp} * {slices} = {pp * slices}"
        yield Problem("model.num_layers", f"{layers} is fewer than {product}", hint="a stage holds one block or more")
    unit, tokens = train.seq_len * train.micro_batch_size * (parallel.dp or 0), train.global_batch_tokens
    if slices <= 1 or unit < 1 or tokens % unit:
        return
    if leaves_rest(tokens // unit, pp):
        factors = f"({train.seq_len} * {train.micro_batch_size} * {parallel.dp})"
        message = (
            f"{tokens} / (seq_len * micro_batch_size * parallel.dp) = {tokens} / {factors} = {tokens // unit} micro "
            f"batches per replica, not a multiple of parallel.pp = {pp}, as parallel.virtual_stages = {slices} needs"
        )
        yield Problem("train.global_batch_tokens", message, hint="change the batch, or set parallel.virtual_stages=1")


CHECKS: tuple[Check, ...] = (
    degrees,
    nodes_share_evenly,
    weights_are_shared_by_replicas,
    tensor_parallel_ranks_share_evenly,
    stages,
)
