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
from hopescale.config.model_shape import head_dim, kv_heads, padded_vocab_size
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
"""Their rotary scaling of each kind, and our keys below `model.attention.rope_scaling`."""
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
    absent = {
        "head.weight": model.tie_embeddings,
        "blocks.{block}.mixer.qkv_proj.bias": not model.attention.qkv_bias,
        "blocks.{block}.mixer.q_norm.weight": not model.attention.qk_norm,
        "blocks.{block}.mixer.k_norm.weight": not model.attention.qk_norm,
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
    groups = [part.unflatten(0, (kv_heads(model), -1, head_dim(model))) for part in parts]
    return torch.cat(groups, dim=1).flatten(0, 2)


def split(pair: Pair, weight: Tensor, model: ModelConfig) -> tuple[Tensor, ...]:
    """Undo `join`."""
    if pair.rows:
        return (weight[: model.vocab_size].contiguous(),)
    if len(pair.theirs) == 1:
        return (weight,)
    shared_by = model.num_heads // kv_heads(model)
    groups = weight.unflatten(0, (kv_heads(model), shared_by + 2, head_dim(model)))
    return tuple(part.flatten(0, 2).contiguous() for part in groups.split([shared_by, 1, 1], dim=1))


def _part_shapes(pair: Pair, model: ModelConfig) -> list[tuple[int, ...]]:
    """Return how the shape of each part must begin, where putting parts together needs to know."""
    if pair.rows:
        return [(model.vocab_size,)]
    if len(pair.theirs) == 1:
        return [()]
    return [(heads * head_dim(model),) for heads in (model.num_heads, kv_heads(model), kv_heads(model))]


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
    windowed = {kind == "sliding_attention" for kind in theirs.get("layer_types") or ()} or {family == "mistral"}
    odd = {
        f"hidden_act {theirs.get('hidden_act')}": theirs.get("hidden_act") != "silu",
        "attention_bias (of the out-projection)": family != "qwen2" and theirs.get("attention_bias"),
        "mlp_bias": theirs.get("mlp_bias"),
        "sliding-window attention in some layers": len(windowed) > 1,
        f"rope_type {kind}": kind not in ("default", *ROPE),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0) != 1.0,
    }
    if problems := [name for name, found in odd.items() if found]:
        raise CheckpointError(f"{origin} has {', '.join(problems)}, which hopescale's attention does not have")
    ours = {key: theirs.get(name) for name, key in SETTINGS.items()}
    if ours["head_dim"] == ours["d_model"] // ours["num_heads"]:
        ours["head_dim"] = None
    attention = {"num_kv_heads": theirs.get("num_key_value_heads"), "rope_theta": rope.get("rope_theta", 10_000.0)}
    attention["window"] = theirs.get("sliding_window") if True in windowed else None
    if kind != "default":
        scaling = {key: rope[name] for name, key in ROPE[kind].items() if name in rope}
        attention["rope_scaling"] = {"kind": kind, **scaling}
    return {"mixer": "attention", "attention": FAMILIES[family] | attention, **ours}


def write_settings(ours: Mapping[str, Any], d_ff: int) -> dict[str, Any]:
    """Undo `read_settings` for a Transformer with one level.

    Raises:
        CheckpointError: If no family has such attention.
    """
    attention = ours["attention"]
    switches = {name: attention[name] for name in ("qkv_bias", "qk_norm")}
    window = attention.get("window")  # not known to checkpoints older than the key
    fitting = (name for name, fixed in FAMILIES.items() if fixed == switches and not (name == "llama" and window))
    family = next(fitting, None)
    if family is None:
        raise CheckpointError(f"no family of {', '.join(FAMILIES)} has attention with {switches}")
    theirs: dict[str, Any] = {"model_type": family, "hidden_act": "silu", "intermediate_size": d_ff}
    if window:
        theirs |= {"sliding_window": window, "use_sliding_window": True, "max_window_layers": 0}
    theirs |= {name: ours[key] for name, key in SETTINGS.items()}
    theirs["head_dim"] = ours["head_dim"] or ours["d_model"] // ours["num_heads"]
    theirs["num_key_value_heads"] = attention["num_kv_heads"] or ours["num_heads"]
    theirs["rope_parameters"] = {"rope_type": "default", "rope_theta": attention["rope_theta"]}
    if scaling := attention["rope_scaling"]:
        factors = {name: scaling[key] for name, key in ROPE[scaling["kind"]].items()}
        theirs["rope_parameters"] |= {"rope_type": scaling["kind"], **factors}
    return theirs
