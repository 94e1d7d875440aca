"""Level stacking (Nested Learning, Section 7.3): a pre-trained Transformer's MLPs become levels.

The stacked model computes what the source does, until it is trained.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoConfig

from hopescale.checkpoint.load import first_line
from hopescale.checkpoint.manifest import Manifest, fingerprint
from hopescale.common.errors import CheckpointError, ConfigError, DataError
from hopescale.config.check import check
from hopescale.config.load import from_dict, to_dict
from hopescale.config.model_shape import by_period, levels_of_block
from hopescale.config.schema import ModelConfig, RunConfig
from hopescale.convert.hf import Progress, SafetensorsFolder, num_bytes, unheard, weight_entries, write_checkpoint
from hopescale.convert.mapping import join, pairs, read_settings
from hopescale.data.load_tokenizer import find_tokenizer
from hopescale.data.tokenizer import Tokenizer

FLOATS = ("float64", "float32", "float16", "bfloat16")
Stacking = Literal["copy", "depth"]
PLACEMENTS = {"copy": "every_block", "depth": "depth"}
"""Where levels stand. `copy`: the slowest level of a block is the source's MLP; the others begin as copies of it whose
last matrix is zero, so that they add nothing yet. `depth`: a block's MLP becomes the one level of the block."""


def stack(
    folder: Path,
    out: Path,
    levels: Mapping[str, int],
    stacking: Stacking,
    precision: str | None,
    report: Callable[[str], None] = lambda line: None,
    progress: Progress = unheard,
) -> Path:
    """Write the checkpoint, at step 0, of a model whose levels are made of a pre-trained model's MLPs.

    Args:
        folder: Folder of the pre-trained model: Llama, Mistral, Qwen2 or Qwen3.
        out: Run folder to create.
        levels: Period of each level, by name. One of period 1 makes a Transformer.
        stacking: Key of `PLACEMENTS`.
        precision: Precision as in `train.precision`; None is bf16 for a source in bfloat16, else fp32.
        report: Listener for a line about the tokenizer.
        progress: Listener for the progress of the work.

    Raises:
        ConfigError: If the levels do not make a model.
        CheckpointError: If the folder is damaged or of another kind, or `out` exists or cannot be written.
    """
    theirs = read_source(folder)
    settings = read_settings(theirs, str(folder))
    source = SafetensorsFolder(folder)
    if precision is None:
        precision = "bf16" if source.entry(next(iter(source))).dtype == "bfloat16" else "fp32"
    settings["cms"] = {
        "placement": PLACEMENTS[stacking],
        "levels": {n: {"d_ff": theirs["intermediate_size"], "update_every_steps": p} for n, p in levels.items()},
    }
    config = _config(folder, settings, precision)
    weights = _stacked(source, config, folder, progress)
    tree = to_dict(config)
    manifest = Manifest({"step": 0, "tokens_seen": 0}, tree, {"model": fingerprint(tree["model"])})
    tokenizer = _tokenizer(folder, config.model, report)
    return write_checkpoint(out, weights, manifest, tokenizer=tokenizer, progress=progress)


def read_source(folder: Path) -> dict[str, Any]:
    """Read the config of a pre-trained model, standardised by transformers.

    Raises:
        CheckpointError: If there is none, or it is not readable.
    """
    require_config(folder)
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False).to_dict()
    except Exception as error:  # each family checks its config in its own way
        raise CheckpointError(f"transformers cannot read {folder / 'config.json'}: {first_line(error)}") from error


def require_config(folder: Path) -> None:
    """Refuse a path that is no folder of transformers, which itself would look for a model of that name elsewhere.

    Raises:
        CheckpointError: If there is no config.
    """
    if not (folder / "config.json").is_file():
        message = f"{folder} is no folder of transformers: it holds no config.json"
        raise CheckpointError(message, "fetch the model first")


def _config(folder: Path, model: Mapping[str, Any], precision: str) -> RunConfig:
    tree = to_dict(RunConfig())
    tree["name"] = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._") or "stacked"
    tree["model"] = model
    tree["train"]["precision"] = precision
    config = from_dict(tree, str(folder))
    if problems := [problem for problem in check(config) if problem.key.startswith("model.")]:
        raise ConfigError(problems)
    return config


def _stacked(source: SafetensorsFolder, config: RunConfig, folder: Path, progress: Progress) -> dict[str, Tensor]:
    """Return all weights: each of the source's in its place, and in the levels beside it copies that add nothing."""
    model, entries, used, weights, done = config.model, weight_entries(config), set(), {}, 0
    types, total = (
        {n: getattr(torch, entry.dtype) for n, entry in entries.items()},
        sum(map(num_bytes, entries.values())),
    )
    for pair in pairs(model, lambda block: [*levels_of_block(model, block)][-1]):
        if missing := [name for name in pair.theirs if name not in source]:
            raise CheckpointError(f"{folder} does not hold {missing[0]}, which its config asks for")
        if odd := [name for name in pair.theirs if source.entry(name).dtype not in FLOATS]:
            message = f"{folder} is quantised: {odd[0]} is {source.entry(odd[0]).dtype}, not {' or '.join(FLOATS)}"
            raise CheckpointError(message, "take the model's unquantised weights")
        used |= {*pair.theirs}
        weights[pair.ours] = join(pair, [source[name] for name in pair.theirs], model).to(types[pair.ours])
        progress("reading", done := done + weights[pair.ours].nbytes, total)
    ignored = {name for name in source if name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")}
    if surplus := sorted(source.keys() - used - ignored):
        raise CheckpointError(f"{folder} holds {surplus[0]}, which hopescale's model has no place for")
    tied, head = model.tie_embeddings, "lm_head.weight"
    if tied and head in source and not torch.equal(source[head], source["model.embed_tokens.weight"]):
        message = f"the config of {folder} ties the embeddings, but {head} is not model.embed_tokens.weight"
        raise CheckpointError(message, "set tie_word_embeddings to false in its config.json")
    slowest, *faster = [name for name, _ in by_period(model.cms.levels)][::-1]
    for name in [name for name in types if name not in weights]:
        level = next(level for level in faster if f".levels.{level}." in name)
        original = weights[name.replace(f".levels.{level}.", f".levels.{slowest}.")]
        weights[name] = torch.zeros_like(original) if name.endswith("down.weight") else original.clone()
        progress("reading", done := done + original.nbytes, total)
    return {name: weights[name] for name in types}


def _tokenizer(folder: Path, model: ModelConfig, report: Callable[[str], None]) -> Tokenizer | None:
    """Return the source's tokenizer, if it has one whose ids the model knows and that says how a text ends."""
    try:
        tokenizer, reason = find_tokenizer(folder), f"{folder} holds none"
    except DataError as error:
        tokenizer, reason = None, error.message
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        reason = f"{tokenizer.name} has {tokenizer.vocab_size:,} ids, the model {model.vocab_size:,}"
        tokenizer = None
    if tokenizer is None:
        report(f"no tokenizer is kept: {reason}")
    else:
        report(f"the tokenizer is kept: {tokenizer.kind}, end of text {tokenizer.eos_token} ({tokenizer.eos_origin})")
    return tokenizer
