"""A checkpoint as a folder of Hugging Face transformers, and back. Reads and writes a shard of tensors at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hopescale.checkpoint.load import read_tensors, verify
from hopescale.checkpoint.manager import CheckpointManager, find_checkpoint
from hopescale.checkpoint.manifest import (
    EXPORT,
    Manifest,
    TensorEntry,
    damaged,
    describe_file,
    file_problems,
    read_manifest,
    to_json,
)
from hopescale.checkpoint.save import dtype_name
from hopescale.common.disk import staged_folder
from hopescale.common.errors import CheckpointError
from hopescale.common.groups import grouped
from hopescale.config.load import from_dict, to_dict, to_yaml
from hopescale.config.model_shape import attention_mixers
from hopescale.config.schema import ModelConfig, RunConfig
from hopescale.config.transfer import attention_scale, logit_multiplier
from hopescale.convert.card import model_card
from hopescale.convert.mapping import Pair, pairs, split, write_settings
from hopescale.convert.tokenizer import write_tokenizer
from hopescale.data.load_tokenizer import find_tokenizer
from hopescale.data.tokenizer import Tokenizer
from hopescale.infer.level_state import read_levels
from hopescale.infer.load import LoadedModel, empty_model, load_model, with_tokenizer
from hopescale.models import Model
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.slices import own_slice

INDEX = "model.safetensors.index.json"
WEIGHTS = "model."
"""What begins the names of weights in a checkpoint, and those only."""
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_TYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool", "U8": "uint8"}
_TYPES |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"}
CODE = Path(__file__).with_name("hf_model")

Report = Callable[[str], None]
Progress = Callable[[str, int, int], None]
"""Who hears what is done now, how many bytes of it are done, and how many there are."""


def export(
    path: Path,
    out: Path,
    *,
    shard_bytes: int,
    native: bool = False,
    levels: Path | None = None,
    report: Report = lambda line: None,
    on_written: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write a checkpoint of any layout as a folder that transformers loads without hopescale.

    Tensors keep names, types and bits. Memory is needed for one shard and one tensor, or with `levels` for the model.

    Args:
        path: Checkpoint folder, or a run folder, whose latest checkpoint is taken.
        out: Folder to create.
        shard_bytes: Most bytes of a file of tensors that holds more than one.
        native: Whether to write a Transformer as the Llama, Mistral or Qwen that it equals, without code of ours.
        levels: Folder of levels that `hopescale adapt` has kept, written in place of the checkpoint's.
        report: Listener for a line about the tokenizer.
        on_written: Listener for how many bytes of weights are written, and how many there are.

    Returns:
        The checkpoint's manifest, with the tensors and files of the folder.

    Raises:
        CheckpointError: If the checkpoint is missing or damaged, is no such Transformer, or `out` exists or cannot be
            written, or if the levels are damaged or of another model.
    """
    source = find_checkpoint(path)
    adapted = {} if levels is None else read_levels(levels, load_model(source, torch.device("cpu")))
    manifest = verify(source)
    config = from_dict(manifest.config, str(source))
    weights = {n.removeprefix(WEIGHTS): entry for n, entry in manifest.tensors.items() if n.startswith(WEIGHTS)}
    weight_pairs = _native_pairs(config, source) if native else [Pair(name, (name,)) for name in weights]
    body = _native_config(manifest, config) if native else _own_config(manifest, config)
    with staged_folder(out, CheckpointError) as folder:
        _write_weights(source, weight_pairs, weights, config.model, folder, shard_bytes, adapted, on_written)
        if not native:
            for code in CODE.glob("*_hope.py"):
                if not code.name.startswith("tokenization"):
                    shutil.copy(code, folder)
        report(_write_texts(folder, source, manifest, config, body | {"dtype": weights["embedding.weight"].dtype}))
        files = {file.name: describe_file(file) for file in sorted(folder.iterdir())}
        exported = replace(manifest, tensors=weights, files=files)
        if not native:
            (folder / EXPORT).write_text(to_json(exported), encoding="utf-8")
    return exported


def _native_pairs(config: RunConfig, source: Path) -> list[Pair]:
    levels = list(config.model.cms.levels)
    attends = len(attention_mixers(config.model)) == len(config.model.mixers)
    if not attends or len(levels) > 1 or config.model.cms.variant != "sequential":
        hint = "leave --native out"
        raise CheckpointError(f"{source} is no Transformer: only attention and one level are a Llama or its kin", hint)
    if logit_multiplier(config.model) != 1 or attention_scale(config.model) is not None:
        message = "has factors that no Llama has: model.transfer says it was trained wider than its base"
        raise CheckpointError(f"{source} {message}", "leave --native out")
    return list(pairs(config.model, lambda block: levels[0]))


def num_bytes(entry: TensorEntry) -> int:
    """Return the bytes of a tensor."""
    return prod(entry.shape) * getattr(torch, entry.dtype).itemsize


def _write_weights(
    source: Path,
    weight_pairs: Sequence[Pair],
    weights: Mapping[str, TensorEntry],
    model: ModelConfig,
    folder: Path,
    shard_bytes: int,
    adapted: Mapping[str, Tensor],
    on_written: Callable[[int, int], None],
) -> None:
    """Write the tensors shard by shard, those of `adapted` in place of the checkpoint's, then the index."""
    by_name, places, size = {pair.ours: pair for pair in weight_pairs}, {}, 0
    total = sum(num_bytes(weights[name]) for name in by_name)
    shards = list(grouped(by_name, lambda name: num_bytes(weights[name]), shard_bytes))
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = read_tensors(source, [f"{WEIGHTS}{name}" for name in names])
        for name in adapted.keys() & set(names):
            tensors[f"{WEIGHTS}{name}"] = adapted[name].to(tensors[f"{WEIGHTS}{name}"].dtype)
        parts: dict[str, Tensor] = {}
        for name in names:
            pair = by_name[name]
            parts |= zip(pair.theirs, split(pair, tensors.pop(f"{WEIGHTS}{name}"), model), strict=True)
        try:
            save_file(parts, folder / file, {"format": "pt"})
        except SafetensorError as error:
            hint = "free some space or choose a folder on another disk; the unfinished folder was removed"
            raise CheckpointError(f"cannot write {file}: {error}", hint) from error
        places |= dict.fromkeys(parts, file)
        size += sum(part.nbytes for part in parts.values())
        on_written(size, max(size, total))
        del parts
    _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    for file in set(places.values()):
        shutil.copymode(folder / INDEX, folder / file)  # safetensors lets the owner alone read


def _own_config(manifest: Manifest, config: RunConfig) -> dict[str, Any]:
    return {
        "architectures": ["HopeForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_hope.HopeConfig",
            "AutoModelForCausalLM": "modeling_hope.HopeForCausalLM",
        },
        "model_type": "hope",
        "hope": to_dict(config)["model"],
    }


def _native_config(manifest: Manifest, config: RunConfig) -> dict[str, Any]:
    (level,) = config.model.cms.levels.values()
    theirs = write_settings(config.model, level.d_ff)
    length = config.train.seq_len
    for mixer in attention_mixers(config.model).values():
        if mixer.rope_scaling is not None and mixer.rope_scaling.kind == "llama3":
            length = max(length, int(mixer.rope_scaling.factor * mixer.rope_scaling.first_context))
    name = f"{theirs['model_type'].capitalize()}ForCausalLM"
    return {"architectures": [name], **theirs, "max_position_embeddings": length}


def _write_texts(folder: Path, source: Path, manifest: Manifest, config: RunConfig, body: Mapping[str, Any]) -> str:
    """Write the files beside the tensors: configs, tokenizer, model card; return a note on the tokenizer."""
    own_code = "auto_map" in body
    special, pad = {}, {}
    note = "No tokenizer was kept with it."
    if (tokenizer := find_tokenizer(source)) is not None:
        end = tokenizer.eos_id
        special, pad = {"bos_token_id": end, "eos_token_id": end}, {"pad_token_id": end}
        note = write_tokenizer(tokenizer, folder, own_code=own_code)
    _write_json(folder / "config.json", {**body, **special})
    _write_json(folder / "generation_config.json", {"do_sample": False, **special, **pad})
    card = model_card(manifest, config, to_yaml(config), note, own_code=own_code)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return note


def _write_json(path: Path, body: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def unheard(verb: str, done: int, total: int) -> None:
    """Take progress that nobody wants to hear of."""


class _Told:
    """A listener for bytes that tells of their sum."""

    def __init__(self, told: Progress, verb: str, total: int):
        self._told, self._verb, self._done, self._total = told, verb, 0, total

    def __call__(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._told(self._verb, min(self._done, self._total), self._total)


def restore_export(folder: Path, out: Path, progress: Progress = unheard) -> Path:
    """Undo `export`: write the weights of a folder it has made as the one checkpoint of a run folder, and return it.

    Raises:
        CheckpointError: If a file is missing or changed, or `out` exists or cannot be written.
    """
    manifest = read_export(folder, progress)
    weights, tokenizer = dict(SafetensorsFolder(folder)), find_tokenizer(folder)
    return write_checkpoint(out, weights, manifest, tokenizer=tokenizer, progress=progress)


def read_export(folder: Path, progress: Progress = unheard) -> Manifest:
    """Read the manifest of an export, after comparing every byte of it.

    Raises:
        CheckpointError: If it is none, or a file is missing or changed.
    """
    if (folder / "config.json").exists() and not (folder / EXPORT).exists():
        hint = "to begin from a trained model, say what it becomes: convert from-hf --as hope-attention --levels ..."
        raise CheckpointError(f"{folder} was not written by `convert to-hf`: it holds no {EXPORT}", hint)
    manifest = read_manifest(folder, EXPORT)
    check_files(folder, manifest, progress=progress)
    return manifest


def check_files(folder: Path, manifest: Manifest, suffix: str = "", *, progress: Progress = unheard) -> None:
    """Compare every byte of the files of an export, or of those with a suffix, with its manifest.

    Raises:
        CheckpointError: If a file is missing, truncated or changed; all of them are named.
    """
    chosen = {name: entry for name, entry in manifest.files.items() if name.endswith(suffix)}
    told = _Told(progress, "checking", sum(entry.bytes for entry in chosen.values()))
    if problems := file_problems(folder, chosen, digests=True, on_read=told):
        raise damaged(folder, problems)


def load_export(folder: Path, device: torch.device, mesh: Mesh | None = None) -> LoadedModel:
    """Load an export as our own model, or with a `mesh` this rank's part of it, as `load_model` does a checkpoint.

    Raises:
        CheckpointError: If a file is missing or changed.
    """
    manifest = read_export(folder)
    weights = SafetensorsFolder(folder)
    check_weights({name: weights.entry(name) for name in weights}, from_dict(manifest.config, str(folder)), str(folder))
    model = empty_model(manifest, folder, mesh)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(own_slice(weights[name], parameter.spec.partition_dim, model.mesh))
    return with_tokenizer(model, manifest, folder, device)


def write_checkpoint(
    out: Path,
    weights: Mapping[str, Tensor],
    manifest: Manifest,
    *,
    tokenizer: Tokenizer | None,
    progress: Progress = unheard,
) -> Path:
    """Write the weights of a whole model as the one checkpoint of a new run folder, with its tokenizer.

    Of the manifest, `progress`, `config` and `identity` are kept.

    Raises:
        CheckpointError: If the weights are not those of the config's model, or `out` exists or cannot be written.
    """
    config = from_dict(manifest.config, str(out))
    check_weights({name: _entry(weight) for name, weight in weights.items()}, config, str(out))
    with staged_folder(out, CheckpointError) as folder:
        files = [] if tokenizer is None else tokenizer.copy_to(folder)
        checkpoints = CheckpointManager(folder / "checkpoints", config.checkpoint, tokenizer=files)
        told = _Told(progress, "writing", sum(weight.nbytes for weight in weights.values()))
        checkpoints.save(manifest.step, {"model": dict(weights)}, manifest, blocking=True, on_written=told)
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    return find_checkpoint(out)


def _entry(tensor: Tensor) -> TensorEntry:
    return TensorEntry(tuple(tensor.shape), dtype_name(tensor.dtype))


def weight_entries(config: RunConfig) -> dict[str, TensorEntry]:
    """Return shape and type of every weight of a config's model, by name; takes no memory for them."""
    with torch.device("meta"):
        model = Model(config.model)
    if config.train.precision == "bf16":
        model.to_precision(torch.bfloat16)
    return {name: _entry(parameter) for name, parameter in model.named_parameters()}


def check_weights(found: Mapping[str, TensorEntry], config: RunConfig, origin: str) -> None:
    """Compare names, shapes and types of weights with those of a config's model.

    Raises:
        CheckpointError: With the missing, surplus and different tensors.
    """
    wanted = weight_entries(config)
    groups = {
        "missing": sorted(wanted.keys() - found.keys()),
        "surplus": sorted(found.keys() - wanted.keys()),
        "different": [
            f"{name} ({found[name]}, the config says {wanted[name]})"
            for name in sorted(wanted.keys() & found.keys())
            if wanted[name] != found[name]
        ],
    }
    lines = [f"{title}: {', '.join(islice(names, 6))}" for title, names in groups.items() if names]
    if lines:
        raise CheckpointError(f"the weights for {origin} are not those of its config; {'; '.join(lines)}")


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of a folder of safetensors files by name, each mapped into memory when it is asked for.

    Args:
        folder: Holds `model.safetensors`, or shards and their index.

    Raises:
        CheckpointError: If a file is missing, truncated or differs from its entry in the index.
    """

    def __init__(self, folder: Path):
        self._files: dict[str, Any] = {}
        self._places: dict[str, str] = {}
        wanted, file = None, INDEX
        try:
            if (folder / INDEX).exists():
                wanted = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            for file in sorted(set(wanted.values())) if wanted else ["model.safetensors"]:
                self._files[file] = safe_open(folder / file, framework="pt")
                self._places |= dict.fromkeys(self._files[file].keys(), file)
        except FileNotFoundError:
            raise CheckpointError(f"{folder} holds no weights: {file} is missing", "fetch it again") from None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder} is damaged: {file} cannot be read: {error}", "fetch it again") from None
        if not self._places:
            raise CheckpointError(f"{folder} holds no weights: {file} is empty", "fetch it again")
        if wanted is not None and wanted != self._places:
            odd = sorted(wanted.items() ^ self._places.items())[0]
            message = f"{folder} is damaged: {INDEX} and the files disagree on the place of {odd[0]}"
            raise CheckpointError(message, "fetch it again")

    def __getitem__(self, name: str) -> Tensor:
        return self._files[self._places[name]].get_tensor(name)

    def entry(self, name: str) -> TensorEntry:
        """Return shape and type of a tensor without reading it.

        Raises:
            CheckpointError: If it is of a type that is not known here.
        """
        part = self._files[self._places[name]].get_slice(name)
        if (kind := part.get_dtype()) not in _TYPES:
            raise CheckpointError(f"{name} is of the type {kind}; known are {', '.join(_TYPES)}")
        return TensorEntry(tuple(part.get_shape()), _TYPES[kind])

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
