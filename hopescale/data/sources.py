"""Open the data sets that a config names, and find everything that is wrong with them at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hopescale.common.errors import ConfigError, DataError, Problem
from hopescale.common.object_store import is_address
from hopescale.config.schema import DataConfig, SourceConfig
from hopescale.data.dataset import PreparedData
from hopescale.data.identity import of_generated
from hopescale.data.order import PATTERN_LENGTH
from hopescale.data.samples import PackedSamples, Samples
from hopescale.data.staged import copy_of
from hopescale.data.suite_samples import SuiteSamples
from hopescale.data.synthetic import SyntheticSamples, problems
from hopescale.data.tokenizer import Tokenizer
from hopescale.suites import registry

_VOCAB_MULTIPLE = 64
_MOST_PADDING = 1024
"""Entries of a vocabulary that no id of the tokenizer names, as pre-trained models have them: 267 of Qwen3's."""


@dataclass(frozen=True)
class Source:
    """One data set of a mixture, ready to read."""

    weight: float
    train: Samples
    validation: Samples | None
    """Null where nothing was held out."""
    tokenizer: Tokenizer | None
    """Null for generated data."""
    bytes_per_token: float | None
    """Of the held-out split; null where there is no text."""
    identity: str
    """Changes with any change of content."""


def open_sources(config: DataConfig, *, seq_len: int, vocab_size: int) -> dict[str, Source]:
    """Open every source that is not null.

    Ranges of single settings are `hopescale.config`'s to check; here it is the settings against the data.

    Raises:
        ConfigError: If a setting is wrong; carries every problem.
        DataError: If only files are wrong; names all of them.
    """
    named = {name: source for name, source in config.sources.items() if source is not None}
    settings, files, sources = list(_weight_problems(named)), [], {}
    for name, source in named.items():
        key = f"data.sources.{name}"
        kinds = [kind for kind in ("path", "synthetic", "suite") if getattr(source, kind) is not None]
        if len(kinds) != 1:
            having = " and ".join(kinds) or "none"
            settings.append(Problem(key, f"needs one of path, synthetic and suite, has {having}"))
        elif source.path is None:
            (kind,) = kinds
            check = problems if kind == "synthetic" else registry.problems
            faults = check(getattr(source, kind), seq_len=seq_len, vocab_size=vocab_size)
            settings += [Problem(f"{key}.{kind}.{field}", message) for field, message in faults]
            if not faults:
                sources[name] = _generated(source, config.seed, seq_len)
        else:
            try:
                place = source.path if config.staged is None else copy_of(source.path, config.staged)
                data = PreparedData(place, cache=config.cache)
            except DataError as error:
                is_absolute = is_address(source.path) or Path(source.path).expanduser().is_absolute()
                where = "" if is_absolute else f" (from the working directory, {Path.cwd()})"
                files.append(Problem(f"{key}.path", f"{error.message}{where}", hint=error.hint))
                continue
            settings += _text_problems(f"{key}.path", source, data, seq_len, vocab_size)
            sources[name] = _text(source, data, seq_len)
    settings += _tokenizer_problems(sources)
    if settings:
        raise ConfigError(settings + files)
    if files:
        raise DataError("\n".join(map(str, files)).strip())
    return sources


def _weight_problems(sources: dict[str, SourceConfig]) -> Iterator[Problem]:
    if not sources:
        hint = "set data.sources.<name>.path to a prepared folder"
        yield Problem("data.sources", "there is no data set to read", hint=hint)
    total = sum(source.weight for source in sources.values())
    for name, source in sources.items():
        if source.weight / total * PATTERN_LENGTH < 1:
            share = f"{source.weight} of {total:g} in all, a share of {source.weight / total:.2g}"
            hint = f"the smallest share is 1/{PATTERN_LENGTH}; data.sources.{name}=null removes the source"
            yield Problem(f"data.sources.{name}.weight", share, hint=hint)


def _generated(source: SourceConfig, seed: int, seq_len: int) -> Source:
    config, kind = (source.suite, SuiteSamples) if source.synthetic is None else (source.synthetic, SyntheticSamples)
    train, validation = (kind(config, seed=seed, split=split, seq_len=seq_len) for split in ("train", "validation"))
    return Source(source.weight, train, validation, None, None, of_generated(config))


def _text(source: SourceConfig, data: PreparedData, seq_len: int) -> Source:
    held_out = data.splits["validation"]
    return Source(
        weight=source.weight,
        train=PackedSamples(data.splits["train"], seq_len),
        validation=PackedSamples(held_out, seq_len) if held_out.num_tokens else None,
        tokenizer=data.tokenizer,
        bytes_per_token=held_out.bytes_per_token if held_out.num_tokens else None,
        identity=data.identity,
    )


def _text_problems(
    key: str, source: SourceConfig, data: PreparedData, seq_len: int, vocab_size: int
) -> Iterator[Problem]:
    size = data.index.vocab_size
    is_padded = vocab_size % _VOCAB_MULTIPLE == 0 and size <= vocab_size <= size + _MOST_PADDING
    if size != vocab_size and not is_padded:
        message = f"is {vocab_size}, but the tokenizer of {key}={source.path} has {size}"
        hint = f"set model.vocab_size={size} (or up to {_MOST_PADDING} more, as a multiple of {_VOCAB_MULTIPLE}), "
        hint += "or prepare the text with the model's tokenizer"
        yield Problem("model.vocab_size", message, hint=hint)
    for split, stream in data.splits.items():
        nothing_held_out = split == "validation" and not stream.num_tokens
        if stream.num_tokens <= seq_len and not nothing_held_out:
            message = (
                f"the {split} split has {stream.num_tokens} tokens, one sequence needs {seq_len + 1} "
                f"(train.seq_len {seq_len} and the last target)"
            )
            hint = "lower train.seq_len, or prepare more text"
            if split == "validation":
                hint += ", a larger --validation, or none at all with --validation 0"
            yield Problem(key, message, hint=hint)


def _tokenizer_problems(sources: dict[str, Source]) -> Iterator[Problem]:
    prints = {name: source.tokenizer.fingerprint for name, source in sources.items() if source.tokenizer}
    if len(set(prints.values())) > 1:
        listed = ", ".join(f"{name} has {fingerprint[:12]}" for name, fingerprint in prints.items())
        hint = "prepare all sources with the same --tokenizer"
        yield Problem("data.sources", f"different tokenizers: {listed}", hint=hint)
