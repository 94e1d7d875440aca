"""Parameters, operations and activations of attention."""

from __future__ import annotations

from collections.abc import Iterator

from hopescale.config.model_shape import head_dim, kv_heads, qkv_parts
from hopescale.config.schema import AttentionConfig, ModelConfig
from hopescale.cost.micro_batch import Activations, MicroBatch
from hopescale.cost.operation import OpCost, product
from hopescale.cost.parameter import FP32, ParameterShape


def attention_parameters(model: ModelConfig, mixer: AttentionConfig) -> Iterator[ParameterShape]:
    """List the parameters of a mixer, by their names in it."""
    dim = head_dim(model)
    size = (model.num_heads + 2 * kv_heads(model, mixer)) * dim
    yield ParameterShape("qkv_proj.weight", (size, model.d_model), 0, parts=qkv_parts(model, mixer))
    if mixer.qkv_bias:
        yield ParameterShape("qkv_proj.bias", (size,), 0)
    yield ParameterShape("out_proj.weight", (model.d_model, model.num_heads * dim), 1)
    for name in ("q_norm", "k_norm") if mixer.qk_norm else ():
        yield ParameterShape(f"{name}.weight", (dim,), keep_fp32=True)


def attention_maps(model: ModelConfig, mixer: AttentionConfig) -> OpCost:
    """Count the maps in and out for a token."""
    return product(1, model.d_model, 2 * (model.num_heads + kv_heads(model, mixer)) * head_dim(model))


def attention_mixing(model: ModelConfig, mixer: AttentionConfig, seq_len: int, recompute: str | None) -> OpCost:
    """Count scores and reads for a token; without `recompute`, the value of `train.recompute`, the model alone."""
    reads = product(1, head_dim(model), _keys_per_token(mixer, seq_len, recompute)).times(2 * model.num_heads)
    # Each gradient is two products; the scores are a third.
    return reads if recompute is None else OpCost(reads.forward, 2.5 * reads.forward)


def _keys_per_token(mixer: AttentionConfig, seq_len: int, recompute: str | None) -> float:
    """Count the keys that a token of attention sees, on average, or that it is multiplied with if anything runs."""
    window = mixer.window or seq_len
    if seq_len <= window:
        return (seq_len + 1) / 2
    later = seq_len - window
    # Each block of later tokens reads its own keys and those of the block before.
    keys = later * window if recompute is None else -(-later // window) * 2 * window**2
    return (window * (window + 1) / 2 + keys) / seq_len


def attention_activations(model: ModelConfig, mixer: AttentionConfig, micro: MicroBatch, recompute: str) -> Activations:
    """Count queries and keys after rotation, values within the in-projection's result, the answer, and it in order.

    Attention itself computes nothing again, whatever `recompute` says.
    """
    heads, groups, dim = model.num_heads / micro.tp, kv_heads(model, mixer) / micro.tp, head_dim(model)
    rotated, projected = (heads + groups) * dim, (heads + 2 * groups) * dim
    kept = micro.tokens * ((rotated + projected + 2 * heads * dim) * micro.itemsize + heads * FP32)
    if mixer.qk_norm:
        copies = 1 if micro.itemsize == FP32 else 2
        kept += micro.tokens * (rotated * copies + heads + groups) * FP32
    window, in_blocks = mixer.window or micro.seq_len, 0.0
    if (later := micro.seq_len - window) > 0:
        # Blocks of later queries and their answers, with two blocks of keys and values each.
        in_blocks = micro.batch * -(-later // window) * window * (2 * heads + 4 * groups) * dim
    kept += in_blocks * micro.itemsize
    # The gradients of queries, keys and values, of the in-projection's result, and of its input.
    return Activations(kept, 0, (micro.tokens * (2 * projected + model.d_model) + in_blocks) * micro.itemsize)
