"""What hopescale and the Llama, Mistral and Qwen families call the same things: one table of weights, one of settings.

Both are read in both directions. An export of hopescale's own keeps hopescale's names and needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hopescale.common.errors import CheckpointError
from hopescale.config.model_shape import head_dim, kv_heads, mixer_of_block, padded_vocab_size
from hopescale.config.schema import ModelConfig

_ATTENTION, _MLP = "model.layers.{block}.self_attn", "model.layers.{block}.mlp"


@dataclass(frozen=True)
class Pair:
    """One weight: our name, and theirs of the part or parts it consists of; `{block}` and `{level}` may be open."""

    ours: str
    theirs: tuple[str, ...]
    """Names there. Three are queries, keys and values, which we keep side by side, group by group."""
    rows: bool = False
    """Whether rows are entries of the vocabulary, which we pad."""


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"{_ATTENTION}.{part}_proj.{kind}" for part in "qkv")


WEIGHTS = (
    Pair("embedding.weight", ("model.embed_tokens.weight",), rows=True),
    Pair("blocks.{block}.norm.weight", ("model.layers.{block}.input_layernorm.weight",)),
    Pair("blocks.{block}.mixer.qkv_proj.weight", _qkv("weight")),
    Pair("blocks.{block}.mixer.qkv_proj.bias", _qkv("bias")),
    Pair("blocks.{block}.mixer.q_norm.weight", (f"{_ATTENTION}.q_norm.weight",)),
    Pair("blocks.{block}.mixer.k_norm.weight", (f"{_ATTENTION}.k_norm.weight",)),
    Pair("blocks.{block}.mixer.out_proj.weight", (f"{_ATTENTION}.o_proj.weight",)),
    Pair("blocks.{block}.cms.levels.{level}.norm.weight", ("model.layers.{block}.post_attention_layernorm.weight",)),
    Pair("blocks.{block}.cms.levels.{level}.gate.weight", (f"{_MLP}.gate_proj.weight",)),
    Pair("blocks.{block}.cms.levels.{level}.up.weight", (f"{_MLP}.up_proj.weight",)),
    Pair("blocks.{block}.cms.levels.{level}.down.weight", (f"{_MLP}.down_proj.weight",)),
    Pair("norm.weight", ("model.norm.weight",)),
    Pair("head.weight", ("lm_head.weight",), rows=True),
)
"""Every weight of a Transformer, in the order of the model."""

SETTINGS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "head_dim": "head_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
"""Their settings, and our keys below `model`."""
ROPE = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "first_context",
    },
}
"""Their rotary scaling of each kind, and our keys below `rope_scaling` of a mixer."""
SHARED = ("num_kv_heads", "qkv_bias", "qk_norm", "rope_theta", "rope_scaling")
"""Settings of attention that all layers of a model of theirs share."""
FAMILIES = {
    "llama": {"qkv_bias": False, "qk_norm": False},
    "mistral": {"qkv_bias": False, "qk_norm": False},
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
}
"""Switches that the code of each family fixes. A Mistral is a Llama that may have a window."""
LAYERS = {
    "embedding": "model.embed_tokens",
    "blocks.{block}.mixer": "model.layers.{block}.self_attn",
    "blocks.{block}": "model.layers.{block}",
    "norm": "model.norm",
}
"""Modules whose outputs are the same thing, in the order in which they run."""


def layer_names(model: ModelConfig, model_type: str) -> dict[str, str]:
    """Return our layers and their counterparts in a model of transformers, in the order in which they run."""
    names = [(ours, theirs if model_type in FAMILIES else ours) for ours, theirs in LAYERS.items()]
    embedding, *of_block, norm = names
    blocks = [
        tuple(name.format(block=block) for name in pair) for block in range(model.num_layers) for pair in of_block
    ]
    return dict([embedding, *blocks, norm])


def pairs(model: ModelConfig, level_of_block: Callable[[int], str]) -> Iterator[Pair]:
    """List the weights of a Transformer, names complete; `level_of_block` names the level that is a block's MLP."""
    switches = _switches(model)
    absent = {
        "head.weight": model.tie_embeddings,
        "blocks.{block}.mixer.qkv_proj.bias": not switches["qkv_bias"],
        "blocks.{block}.mixer.q_norm.weight": not switches["qk_norm"],
        "blocks.{block}.mixer.k_norm.weight": not switches["qk_norm"],
    }
    for pair in WEIGHTS:
        if absent.get(pair.ours):
            continue
        for block in range(model.num_layers if "{block}" in pair.ours else 1):
            place = {"block": block, "level": level_of_block(block)}
            theirs = tuple(name.format(**place) for name in pair.theirs)
            yield Pair(pair.ours.format(**place), theirs, pair.rows)


def join(pair: Pair, parts: Sequence[Tensor], model: ModelConfig) -> Tensor:
    """Make our weight of theirs: groups of heads side by side, the vocabulary padded with zeros.

    Raises:
        CheckpointError: If a part has not the shape that the settings say.
    """
    for name, part, shape in zip(pair.theirs, parts, _part_shapes(pair, model), strict=True):
        if tuple(part.shape[: len(shape)]) != shape:
            raise CheckpointError(f"{name} has the shape {list(part.shape)}, its config asks for {list(shape)}")
    if pair.rows:
        (part,) = parts
        return torch.cat([part, part.new_zeros(padded_vocab_size(model) - part.shape[0], part.shape[1])])
    if len(parts) == 1:
        return parts[0]
    groups = [part.unflatten(0, (_kv_heads(model), -1, head_dim(model))) for part in parts]
    return torch.cat(groups, dim=1).flatten(0, 2)


def split(pair: Pair, weight: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """Undo `join`."""
    if pair.rows:
        return (weight[: model.vocab_size].contiguous(),)
    if len(pair.theirs) == 1:
        return (weight,)
    shared_by = model.num_heads // _kv_heads(model)
    groups = weight.unflatten(0, (_kv_heads(model), shared_by + 2, head_dim(model)))
    return tuple(part.flatten(0, 2).contiguous() for part in groups.split([shared_by, 1, 1], dim=1))


def _part_shapes(pair: Pair, model: ModelConfig) -> list[tuple[int, ...]]:
    """Return how the shape of each part must begin, where putting parts together needs to know."""
    if pair.rows:
        return [(model.vocab_size,)]
    if len(pair.theirs) == 1:
        return [()]
    return [(heads * head_dim(model),) for heads in (model.num_heads, _kv_heads(model), _kv_heads(model))]


def _kv_heads(model: ModelConfig) -> int:
    return kv_heads(model, mixer_of_block(model, 0))


def _switches(model: ModelConfig) -> dict[str, Any]:
    """Return the settings that all layers of one of their models share, from the model's first mixer."""
    mixer = mixer_of_block(model, 0)
    return {name: getattr(mixer, name) for name in SHARED}


def read_settings(theirs: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Turn a config that transformers has standardised into our `model` section, levels left out.

    Raises:
        CheckpointError: If it is of another family, or asks for something our model does not have.
    """
    family = theirs.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(f"{origin} is of the family {family}, not of {', '.join(FAMILIES)}")
    rope = dict(theirs.get("rope_parameters") or {})
    kind = rope.get("rope_type", "default")
    odd = {
        f"hidden_act {theirs.get('hidden_act')}": theirs.get("hidden_act") != "silu",
        "attention_bias (of the out-projection)": family != "qwen2" and theirs.get("attention_bias"),
        "mlp_bias": theirs.get("mlp_bias"),
        f"rope_type {kind}": kind not in ("default", *ROPE),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
    }
    if problems := [name for name, found in odd.items() if found]:
        raise CheckpointError(f"{origin} has {', '.join(problems)}, which hopescale's attention does not have")
    ours = {key: theirs.get(name) for name, key in SETTINGS.items()}
    if ours["head_dim"] == ours["d_model"] // ours["num_heads"]:
        ours["head_dim"] = None
    attention = {"num_kv_heads": theirs.get("num_key_value_heads"), "rope_theta": rope.get("rope_theta", 10_000.0)}
    if kind != "default":
        scaling = {key: rope[name] for name, key in ROPE[kind].items() if name in rope}
        attention["rope_scaling"] = {"kind": kind, **scaling}
    full = {"kind": "attention", **FAMILIES[family], **attention}
    window, depth = theirs.get("sliding_window"), ours["num_layers"]
    layers = theirs.get("layer_types") or ["sliding_attention" if family == "mistral" and window else "full"] * depth
    pattern = ["sliding" if layer == "sliding_attention" else "attention" for layer in layers]
    mixers = {name: full | ({"window": window} if name == "sliding" else {}) for name in sorted(set(pattern))}
    if len(mixers) == 1:
        return {"mixers": {"attention": next(iter(mixers.values()))}, "pattern": [], **ours}
    return {"mixers": mixers, "pattern": pattern, **ours}


def write_settings(model: ModelConfig, d_ff: int) -> dict[str, Any]:
    """Undo `read_settings` for a Transformer with one level.

    Raises:
        CheckpointError: If no family has such attention.
    """
    shared, layers = _switches(model), [mixer_of_block(model, number) for number in range(model.num_layers)]
    for mixer in layers:
        if other := [name for name, value in shared.items() if getattr(mixer, name) != value]:
            raise CheckpointError(f"no family of {', '.join(FAMILIES)} has layers that differ in {', '.join(other)}")
    switches = {name: shared[name] for name in ("qkv_bias", "qk_norm")}
    windows = {mixer.window for mixer in layers}
    window = max(filter(None, windows), default=None)
    if len(windows - {None}) > 1:
        raise CheckpointError(f"no family of {', '.join(FAMILIES)} has windows of several sizes: {sorted(windows)}")
    # A Mistral has one kind of layers, and a Llama no window.
    able = [name for name in FAMILIES if not (window and (name == "llama" or (name == "mistral" and None in windows)))]
    family = next((name for name in able if FAMILIES[name] == switches), None)
    if family is None:
        raise CheckpointError(f"no family of {', '.join(able)} has attention with {switches}")
    theirs: dict[str, Any] = {"model_type": family, "hidden_act": "silu", "intermediate_size": d_ff}
    if window:
        kinds = ["full_attention" if mixer.window is None else "sliding_attention" for mixer in layers]
        first = kinds.index("sliding_attention")
        theirs |= {"sliding_window": window, "use_sliding_window": True, "max_window_layers": first}
        theirs |= {"layer_types": kinds} if family != "mistral" else {}
    theirs |= {name: getattr(model, key) for name, key in SETTINGS.items()}
    theirs["head_dim"] = head_dim(model)
    theirs["num_key_value_heads"] = shared["num_kv_heads"] or model.num_heads
    theirs["rope_parameters"] = {"rope_type": "default", "rope_theta": shared["rope_theta"]}
    if scaling := shared["rope_scaling"]:
        factors = {name: getattr(scaling, key) for name, key in ROPE[scaling.kind].items()}
        theirs["rope_parameters"] |= {"rope_type": scaling.kind, **factors}
    return theirs
