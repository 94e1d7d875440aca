"""Checks of how a run is split over ranks. A degree that is null is looked at once the layout is known."""

from __future__ import annotations

from collections.abc import Iterator

from hopescale.common.errors import Problem
from hopescale.config.check_base import Check, Origins, leaves_rest, levels_of
from hopescale.config.layout import AXES
from hopescale.config.model_shape import VOCAB_MULTIPLE, padded_vocab_size
from hopescale.config.schema import RunConfig


def one_degree_at_most_is_open(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """What remains of the ranks is one number."""
    unset = [axis for axis in AXES if getattr(config.parallel, axis) is None]
    if len(unset) > 1:
        hint = "null is what remains of the ranks; set the others"
        yield Problem("parallel", f"{' and '.join(unset)} are null, at most one may be", hint=hint)


def virtual_stages_need_a_pipeline(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """An interleaved schedule has stages to interleave."""
    slices, pp = config.parallel.virtual_stages, config.parallel.pp
    if slices > 1 and pp == 1:
        message = f"{slices} needs parallel.pp of 2 or more, it is {pp}"
        yield Problem("parallel.virtual_stages", message, hint="leave it at 1, or raise parallel.pp")


def sequence_parallel_splits_the_tokens(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Tokens are distributed among the ranks of a layer, of which there are several."""
    tp, seq_len = config.parallel.tp, config.train.seq_len
    if not config.parallel.sequence_parallel or tp is None:
        return
    if tp == 1:
        hint = "leave it off, or raise parallel.tp"
        yield Problem("parallel.sequence_parallel", f"needs parallel.tp of 2 or more, it is {tp}", hint=hint)
    if leaves_rest(seq_len, tp):
        message = f"{seq_len} is not a multiple of parallel.tp = {tp}, which sequence_parallel needs"
        yield Problem("train.seq_len", message)


def tensor_parallel_ranks_share_evenly(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Heads, level widths and rows of the embedding are distributed evenly."""
    tp, model = config.parallel.tp or 1, config.model
    sizes = {"model.num_heads": model.num_heads}
    if model.mixer == "attention" and model.attention.num_kv_heads is not None:
        sizes["model.attention.num_kv_heads"] = model.attention.num_kv_heads
    sizes |= {f"model.cms.levels.{name}.d_ff": level.d_ff for name, level in levels_of(config)}
    for key, size in sizes.items():
        if leaves_rest(size, tp):
            yield Problem(key, f"{size} is not a multiple of parallel.tp = {tp}", hint="change either")
    rows = padded_vocab_size(model)
    if leaves_rest(rows, tp):
        padded = f"{model.vocab_size}, padded to a multiple of {VOCAB_MULTIPLE}, is {rows}"
        yield Problem("model.vocab_size", f"{padded}: not a multiple of parallel.tp = {tp}", hint="change either")


def every_stage_has_a_block(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """A stage, and each slice of one, holds at least one block."""
    pp, slices, layers = config.parallel.pp or 1, config.parallel.virtual_stages, config.model.num_layers
    if 0 < layers < pp * slices:
        product = f"parallel.pp * parallel.virtual_stages = {pp} * {slices} = {pp * slices}"
        yield Problem("model.num_layers", f"{layers} is fewer than {product}", hint="a stage holds one block or more")


def interleaved_micro_batches_fill_the_pipeline(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """The interleaved schedule runs micro batches in groups of as many as there are stages."""
    parallel, train = config.parallel, config.train
    if parallel.virtual_stages <= 1 or parallel.pp is None or parallel.dp is None:
        return
    unit = train.seq_len * train.micro_batch_size * parallel.dp
    if unit < 1 or train.global_batch_tokens % unit:
        return
    count = train.global_batch_tokens // unit
    if leaves_rest(count, parallel.pp):
        factors = f"({train.seq_len} * {train.micro_batch_size} * {parallel.dp})"
        message = (
            f"{train.global_batch_tokens} / (seq_len * micro_batch_size * parallel.dp) = "
            f"{train.global_batch_tokens} / {factors} = {count} micro batches per replica, not a multiple of "
            f"parallel.pp = {parallel.pp}, as parallel.virtual_stages = {parallel.virtual_stages} needs"
        )
        yield Problem("train.global_batch_tokens", message, hint="change the batch, or set parallel.virtual_stages=1")


def zero_needs_replicas(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """What is sharded is shared by several replicas, and a pipeline needs whole gradients and weights."""
    zero, dp, pp = config.parallel.zero, config.parallel.dp, config.parallel.pp
    if zero >= 1 and dp == 1:
        hint = "set parallel.zero=0, or run more replicas"
        yield Problem("parallel.zero", f"{zero} has no effect: parallel.dp is {dp}", hint=hint)
    if zero >= 2 and pp is not None and pp > 1:
        message = f"{zero} needs parallel.pp of 1, it is {pp}"
        yield Problem("parallel.zero", message, hint="with a pipeline, 1 is the most")


def the_first_step_may_take_longer(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """The first step does what every step does, and more."""
    first, later = config.parallel.first_step_timeout_s, config.parallel.timeout_s
    if 0 < first < later:
        hint = "set it to that at least"
        yield Problem("parallel.first_step_timeout_s", f"{first} is below parallel.timeout_s = {later}", hint=hint)


CHECKS: tuple[Check, ...] = (
    one_degree_at_most_is_open,
    virtual_stages_need_a_pipeline,
    sequence_parallel_splits_the_tokens,
    tensor_parallel_ranks_share_evenly,
    every_stage_has_a_block,
    interleaved_micro_batches_fill_the_pipeline,
    zero_needs_replicas,
    the_first_step_may_take_longer,
)
