"""Description of a folder, a checkpoint, an export, or a model of transformers, from its small files alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from hopescale.checkpoint.manager import find_checkpoint
from hopescale.checkpoint.manifest import EXPORT, Manifest, TensorEntry, read_manifest
from hopescale.common.errors import CheckpointError
from hopescale.common.units import format_bytes, plural
from hopescale.config.load import from_dict
from hopescale.config.model_shape import block_pattern, by_period
from hopescale.config.schema import RunConfig
from hopescale.convert.hf import SafetensorsFolder, num_bytes
from hopescale.cost.params import describe_params
from hopescale.data.tokenizer import JSON_FILE, SENTENCEPIECE_FILE

_SIZES = {
    "num_hidden_layers": "{} layers",
    "hidden_size": "width {}",
    "num_attention_heads": "{} heads",
    "vocab_size": "vocabulary {:,}",
}
"""What most configs of transformers state; those of several models in one do not."""


def describe(path: Path) -> dict[str, str]:
    """Say what a folder is, in lines by title: a run folder, a checkpoint, an export, or a folder of transformers.

    Raises:
        CheckpointError: If it is none of these, or its manifest is damaged.
    """
    if (path / EXPORT).exists():
        manifest = read_manifest(path, EXPORT)
        files = len([name for name in manifest.files if name.endswith(".safetensors")])
        rows = {"kind": f"export for transformers, {plural(files, 'file')} of weights"}
        return rows | _of_manifest(manifest, path)
    if (path / "config.json").exists():
        return _of_transformers(path)
    folder = find_checkpoint(path)
    manifest = read_manifest(folder)
    ranks = len({name.split("_")[2] for name in manifest.files if name.endswith(".distcp")})
    config = from_dict(manifest.config, str(folder))
    axes = ("dp", "tp", "pp", *["cp"] * (config.parallel.cp > 1))
    degrees = ", ".join(f"{axis} {getattr(config.parallel, axis) or 'open'}" for axis in axes)
    degrees += f", zero {config.parallel.stage}"
    rows = {
        "kind": f"checkpoint {folder}",
        "layout": f"saved by {ranks} rank{'s' if ranks > 1 else ''} ({degrees}); fits any",
    }
    return rows | _of_manifest(manifest, folder) | {"optimizer": _optimizer(manifest, config)}


def _of_manifest(manifest: Manifest, folder: Path) -> dict[str, str]:
    config = from_dict(manifest.config, str(folder))
    weights = [entry for name, entry in manifest.tensors.items() if not name.startswith(("optimizer.", "generators."))]
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    data = manifest.identity.get("data")
    kept = [name for name in (SENTENCEPIECE_FILE, JSON_FILE) if name in manifest.files]
    return {
        "name": config.name,
        "step": f"{manifest.step:,} of {config.train.steps:,}, {manifest.progress['tokens_seen']:,} tokens seen",
        **_of_model(config),
        "weights": f"{_size(weights)}, {config.train.precision}",
        "data": "none yet" if data is None else f"{', '.join(config.data.sources)} ({data[:12]})",
        "tokenizer": f"{kept[0]} ({manifest.files[kept[0]].sha256[:12]})" if kept else "none",
        "files": format_bytes(sum(entry.bytes for entry in manifest.files.values())),
        "written by": versions,
    }


def _of_model(config: RunConfig) -> dict[str, str]:
    model = config.model
    levels = [f"{name} {level.d_ff} every {level.update_every_steps}" for name, level in by_period(model.cms.levels)]
    where = "in every block" if model.cms.placement == "every_block" else "over depth"
    counted = Counter(block_pattern(model))
    mixers = ", ".join(f"{model.mixers[name].kind} ({name}) in {blocks}" for name, blocks in counted.items())
    mixers = mixers if len(counted) > 1 else next(iter(model.mixers.values())).kind
    return {
        "model": f"{mixers}, {model.num_layers} blocks, width {model.d_model}, {model.num_heads} heads, "
        f"vocabulary {model.vocab_size:,}",
        "parameters": describe_params(model),
        "levels": f"{'; '.join(levels)} ({where}, {model.cms.variant})",
    }


def _optimizer(manifest: Manifest, config: RunConfig) -> str:
    state = [entry for name, entry in manifest.tensors.items() if name.startswith("optimizer.")]
    if not state:
        return "none: weights alone"
    rules = ", ".join(f"{name}: {group.rule}" for name, group in config.optim.groups.items())
    return f"{rules}; {_size(state)} of state"


def _size(entries: Iterable[TensorEntry]) -> str:
    entries = list(entries)
    return f"{len(entries)} tensors, {format_bytes(sum(map(num_bytes, entries)))}"


def _of_transformers(path: Path) -> dict[str, str]:
    from hopescale.convert.mapping import read_settings
    from hopescale.convert.stacking import read_source

    theirs = read_source(path)
    tensors = SafetensorsFolder(path)
    sizes = [text.format(theirs[key]) for key, text in _SIZES.items() if isinstance(theirs.get(key), int)]
    rows = {
        "kind": f"model of transformers, {theirs.get('model_type')}",
        "model": ", ".join(sizes) or "of unknown sizes",
        "weights": _size(tensors.entry(name) for name in tensors),
    }
    try:
        read_settings(theirs, str(path))
    except CheckpointError as error:
        return rows | {"stacking": f"no: {error.message}"}
    return rows | {"stacking": "yes: convert from-hf --as hope-attention --levels ..."}
