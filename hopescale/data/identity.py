"""What tells one sequence of samples from another, found without opening a data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from hopescale.config.schema import DataConfig
from hopescale.config.schema.run import SyntheticConfig
from hopescale.config.schema.suite import SuiteConfig

INDEX_FILE = "index.json"


def fingerprint(seed: int, seq_len: int, sources: Mapping[str, tuple[float, str]]) -> str:
    """Return the identity of the sequence of samples, hexadecimal.

    Args:
        seed: Seed of the order.
        seq_len: Tokens of a sample.
        sources: Weight and identity of every source.
    """
    return hashlib.sha256(json.dumps([seed, seq_len, sources], sort_keys=True).encode()).hexdigest()


def of_index(content: bytes) -> str:
    """Return the identity of a prepared data set, by the content of its index."""
    return hashlib.sha256(content).hexdigest()


def of_generated(config: SyntheticConfig | SuiteConfig) -> str:
    """Return the identity of a generated data set."""
    return json.dumps(asdict(config), sort_keys=True)


def fingerprint_here(config: DataConfig, seq_len: int) -> str | None:
    """Return the fingerprint of a config's data as it lies here; None where a folder is missing or an address."""
    sources = {}
    for name, source in config.sources.items():
        if source is None:
            continue
        generated = source.synthetic or source.suite
        if generated is None:
            try:
                identity = of_index((Path(source.path).expanduser() / INDEX_FILE).read_bytes())
            except OSError:
                return None
        else:
            identity = of_generated(generated)
        sources[name] = source.weight, identity
    return fingerprint(config.seed, seq_len, sources)
