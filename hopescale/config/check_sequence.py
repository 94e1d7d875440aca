"""Checks of the pieces of sequences, over ranks (`parallel.cp`) and one after the other (`train.segments`)."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hopescale.common.errors import Problem
from hopescale.config.check_base import Check, Origins, leaves_rest
from hopescale.config.model_shape import projection_chunk_size
from hopescale.config.schema import MixerConfig, RunConfig, SelfModifyingConfig
from hopescale.config.schema.titans import TitansConfig
from hopescale.config.schema.ttt import TttConfig


def pieces_of_sequence(config: RunConfig) -> int:
    """Return the pieces of a sequence."""
    return config.parallel.cp * config.train.segments


def sequences_are_cut_into_whole_chunks(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """Pieces are of one size, and end where chunks of memories end."""
    pieces, seq_len = pieces_of_sequence(config), config.train.seq_len
    if config.parallel.cp < 1 or config.train.segments < 1 or pieces == 1:
        return
    product = _names(config)
    if leaves_rest(seq_len, pieces):
        yield Problem("train.seq_len", f"{seq_len} is not a multiple of {product}", hint="change either")
        return
    for name, mixer in config.model.mixers.items():
        chunk = _chunk(mixer)
        if leaves_rest(seq_len // pieces, chunk):
            size = f"{seq_len} / ({product}) = {seq_len // pieces} tokens of a piece"
            message = f"{size} are no whole chunks of {chunk} tokens of model.mixers.{name}"
            hint = f"make it a multiple of {pieces} * {chunk} = {pieces * chunk}, or cut it into fewer pieces"
            yield Problem("train.seq_len", message, hint=hint)
    tp = config.parallel.tp or 1
    if config.parallel.sequence_parallel and leaves_rest(seq_len // pieces, tp):
        message = f"{seq_len // pieces} tokens of a piece are not a multiple of parallel.tp = {tp}"
        yield Problem("parallel.sequence_parallel", f"{message}, which it shares out", hint="turn it off")


def what_is_carried_can_be_handed_on(config: RunConfig, origins: Origins) -> Iterator[Problem]:
    """States of pieces are those of whole sequences, and known beforehand in their shapes."""
    cp = config.parallel.cp
    if cp > 1 and config.parallel.zero > 1:
        message = f"{config.parallel.zero} needs parallel.cp of 1, it is {cp}"
        yield Problem(
            "parallel.zero", message, hint="1 is the most: ranks in a ring cannot wait for all others as well"
        )


def _names(config: RunConfig) -> str:
    """Name the keys that cut sequences, with their values and product."""
    degrees = {"parallel.cp": config.parallel.cp, "train.segments": config.train.segments}
    several = {key: value for key, value in degrees.items() if value > 1}
    product = f"{' * '.join(several)} = {' * '.join(map(str, several.values()))}"
    return product if len(several) == 1 else f"{product} = {pieces_of_sequence(config)}"


def _chunk(mixer: MixerConfig) -> int:
    """Return the tokens after which all chunks of a mixer's memories end together; 1 if it has none, or elsewhere."""
    if isinstance(mixer, TitansConfig) and mixer.composition != "mac":
        return 1
    if isinstance(mixer, TttConfig):
        return mixer.chunk_size
    if not isinstance(mixer, SelfModifyingConfig):
        return 1
    sizes = [mixer.chunk_size, projection_chunk_size(mixer)]
    return math.lcm(*sizes, *([mixer.far.chunk_size] if mixer.far else []))


CHECKS: tuple[Check, ...] = (sequences_are_cut_into_whole_chunks, what_is_carried_can_be_handed_on)
