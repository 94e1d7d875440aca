"""Open the data sets that a config names, and find everything that is wrong with them at once."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from hopescale.common.errors import ConfigError, DataError, Problem
from hopescale.config.schema import DataConfig, SourceConfig
from hopescale.data.dataset import PreparedData, TokenStream
from hopescale.data.order import PATTERN_LENGTH
from hopescale.data.samples import PackedSamples, Samples
from hopescale.data.staged import copy_of
from hopescale.data.synthetic import SyntheticSamples, problems
from hopescale.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Source:
    """One data set of a mixture, ready to read."""

    weight: float
    train: Samples
    validation: Samples | None
    """Null where nothing was held out."""
    tokenizer: Tokenizer | None
    """Null for synthetic data."""
    bytes_per_token: float | None
    """Of the held-out split; null where there is no text."""
    identity: str
    """Changes with any change of content."""


class _Findings:
    """Problems of settings and of files, kept apart because they end a program with different exit codes."""

    def __init__(self) -> None:
        self.settings: list[Problem] = []
        self.files: list[Problem] = []

    def add(self, key: str, message: str, hint: str | None = None) -> None:
        self.settings.append(Problem(key, message, hint=hint))

    def add_error(self, key: str, error: DataError) -> None:
        self.files.append(Problem(key, error.message, hint=error.hint))

    def raise_if_any(self) -> None:
        if self.settings:
            raise ConfigError(self.settings + self.files)
        if self.files:
            message = "\n".join(map(str, self.files)).strip()
            raise DataError(message)


def open_sources(config: DataConfig, *, seq_len: int, vocab_size: int) -> dict[str, Source]:
    """Open every source that is not null.

    Ranges of single settings are `hopescale.config`'s to check; here it is the settings against the data.

    Raises:
        ConfigError: If a setting is wrong; carries every problem.
        DataError: If only files are wrong; names all of them.
    """
    findings = _Findings()
    named = {name: source for name, source in config.sources.items() if source is not None}
    _check_weights(named, findings)
    opened = {name: _open_one(name, source, config, seq_len, vocab_size, findings) for name, source in named.items()}
    sources = {name: source for name, source in opened.items() if source is not None}
    _check_tokenizers(sources, findings)
    findings.raise_if_any()
    return sources


def _check_weights(sources: dict[str, SourceConfig], findings: _Findings) -> None:
    if not sources:
        findings.add(
            "data.sources", "there is no data set to read", "set data.sources.<name>.path to a prepared folder"
        )
    total = sum(source.weight for source in sources.values())
    for name, source in sources.items():
        if source.weight / total * PATTERN_LENGTH < 1:
            share = f"{source.weight} of {total:g} in all, a share of {source.weight / total:.2g}"
            hint = f"the smallest share is 1/{PATTERN_LENGTH}; data.sources.{name}=null removes the source"
            findings.add(f"data.sources.{name}.weight", share, hint)


def _open_one(
    name: str, source: SourceConfig, config: DataConfig, seq_len: int, vocab_size: int, findings: _Findings
) -> Source | None:
    key = f"data.sources.{name}"
    if (source.path is None) == (source.synthetic is None):
        found = "neither" if source.path is None else "both"
        findings.add(key, f"needs either path or synthetic, has {found}")
        return None
    if source.path is None:
        return _open_synthetic(key, source, config.seed, seq_len, vocab_size, findings)
    try:
        prepared = PreparedData(source.path if config.staged is None else copy_of(source.path, config.staged))
    except DataError as error:
        findings.add_error(f"{key}.path", error)
        return None
    return _packed(key, source, prepared, seq_len, vocab_size, findings)


def _open_synthetic(
    key: str, source: SourceConfig, seed: int, seq_len: int, vocab_size: int, findings: _Findings
) -> Source | None:
    config = source.synthetic
    found = problems(config, seq_len=seq_len, vocab_size=vocab_size)
    for field, message in found:
        findings.add(f"{key}.synthetic.{field}", message)
    if found:
        return None
    train, validation = (
        SyntheticSamples(config, seed=seed, split=split, seq_len=seq_len) for split in ("train", "validation")
    )
    return Source(source.weight, train, validation, None, None, json.dumps(asdict(config), sort_keys=True))


def _packed(
    key: str, source: SourceConfig, prepared: PreparedData, seq_len: int, vocab_size: int, findings: _Findings
) -> Source:
    if prepared.index.vocab_size != vocab_size:
        findings.add(
            "model.vocab_size",
            f"is {vocab_size}, but the tokenizer of {key}.path={source.path} has {prepared.index.vocab_size}",
            f"set model.vocab_size={prepared.index.vocab_size}, or prepare the text with the model's tokenizer",
        )
    held_out = prepared.splits["validation"]
    for stream in (prepared.splits["train"], held_out):
        _check_length(key, stream, seq_len, findings)
    return Source(
        weight=source.weight,
        train=PackedSamples(prepared.splits["train"], seq_len),
        validation=PackedSamples(held_out, seq_len) if held_out.num_tokens else None,
        tokenizer=prepared.tokenizer,
        bytes_per_token=held_out.bytes_per_token if held_out.num_tokens else None,
        identity=prepared.identity,
    )


def _check_length(key: str, stream: TokenStream, seq_len: int, findings: _Findings) -> None:
    empty_by_choice = stream.split == "validation" and not stream.num_tokens
    if stream.num_tokens <= seq_len and not empty_by_choice:
        hint = "lower train.seq_len, or prepare more text"
        if stream.split == "validation":
            hint += ", a larger --validation, or none at all with --validation 0"
        findings.add(
            f"{key}.path",
            f"the {stream.split} split has {stream.num_tokens} tokens, one sequence needs {seq_len + 1} "
            f"(train.seq_len {seq_len} and the last target)",
            hint,
        )


def _check_tokenizers(sources: dict[str, Source], findings: _Findings) -> None:
    prints = {name: source.tokenizer.fingerprint for name, source in sources.items() if source.tokenizer}
    if len(set(prints.values())) > 1:
        listed = ", ".join(f"{name} has {fingerprint[:12]}" for name, fingerprint in prints.items())
        findings.add("data.sources", f"different tokenizers: {listed}", "prepare all sources with the same --tokenizer")
