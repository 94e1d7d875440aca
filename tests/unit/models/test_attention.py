"""Attention against the equation written out, and its carried state."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hopescale.config.schema import AttentionConfig, ModelConfig, RopeScalingConfig
from hopescale.models import attention as attention_module
from hopescale.models.attention import Attention
from hopescale.models.init import initialize
from hopescale.ops.documents import Documents
from hopescale.parallel.mesh import Mesh

WIDTH, HEADS, DIM, BATCH = 12, 4, 6, 2


def make_attention(**switches) -> Attention:
    config = ModelConfig(d_model=WIDTH, num_heads=HEADS, head_dim=DIM)
    attention = Attention(config, AttentionConfig(**switches), out_std=0.3, mesh=Mesh.alone())
    initialize(attention, 0, Mesh.alone())
    if attention.qkv_proj.bias is not None:
        torch.nn.init.normal_(attention.qkv_proj.bias, generator=torch.Generator().manual_seed(2))
    return attention.double()


def make_input(tokens: int) -> Tensor:
    return torch.randn(tokens, BATCH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def frequency(i: int, config: AttentionConfig) -> float:
    """Return the angle per token of the i-th pair, `theta^(-2i/D)`, slowed as the paper of Llama 3 says."""
    plain, scaling = config.rope_theta ** (-2 * i / DIM), config.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    turns = scaling.first_context * plain / (2 * math.pi)
    if turns >= scaling.high_freq_factor:
        return plain
    if turns <= scaling.low_freq_factor:
        return plain / scaling.factor
    part = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return part * plain + (1 - part) * plain / scaling.factor


def turn(x: Tensor, position: int, config: AttentionConfig) -> Tensor:
    """Rotate the pair (i, i + D/2) by `position` times its frequency, as complex numbers."""
    half = DIM // 2
    angles = torch.tensor([position * frequency(i, config) for i in range(half)], dtype=torch.float64)
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag])


def naive_attention(attention: Attention, x: Tensor, documents: Tensor | None) -> Tensor:
    tokens = x.shape[0]
    config = attention.config
    groups = config.num_kv_heads or HEADS
    mixed = x @ attention.qkv_proj.weight.T + (attention.qkv_proj.bias if config.qkv_bias else 0)
    mixed = mixed.view(tokens, BATCH, groups, HEADS // groups + 2, DIM)  # queries of the group, its key, its value
    y = torch.zeros(tokens, BATCH, HEADS, DIM, dtype=x.dtype)

    def normed(vector: Tensor, norm) -> Tensor:
        return vector if norm is None else vector / torch.sqrt((vector**2).mean() + 1e-6) * norm.weight

    for b in range(BATCH):
        for h in range(HEADS):
            group, number = divmod(h, HEADS // groups)
            q = [turn(normed(mixed[t, b, group, number], attention.q_norm), t, config) for t in range(tokens)]
            k = [turn(normed(mixed[t, b, group, -2], attention.k_norm), t, config) for t in range(tokens)]
            for t in range(tokens):
                first = 0 if config.window is None else max(0, t + 1 - config.window)
                seen = [s for s in range(first, t + 1) if documents is None or documents[b, s] == documents[b, t]]
                scores = torch.stack([q[t] @ k[s] / DIM**0.5 for s in seen]).softmax(0)
                y[t, b, h] = sum(score * mixed[s, b, group, -1] for score, s in zip(scores, seen, strict=True))
    return y.flatten(2) @ attention.out_proj.weight.T


LLAMA3 = RopeScalingConfig(factor=3.0, low_freq_factor=0.02, high_freq_factor=2.0, first_context=13)
SWITCHES = (
    {},
    {"qk_norm": True},
    {"rope_theta": 50.0},
    {"num_kv_heads": 2, "qkv_bias": True},
    {"num_kv_heads": 1, "qk_norm": True},
    {"rope_scaling": RopeScalingConfig(kind="linear", factor=4.0)},
    {"rope_scaling": LLAMA3, "rope_theta": 50.0},
    {"window": 1},
    {"window": 3, "num_kv_heads": 2},
    {"window": 13},
    {"window": 4, "num_kv_heads": 1, "qk_norm": True},
    {"window": 5},
)


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("tokens", [1, 13])
@pytest.mark.parametrize("within_documents", [False, "under a mask", "one by one"])
def test_attention_equals_its_equation(
    switches: dict, tokens: int, within_documents: str | bool, monkeypatch: pytest.MonkeyPatch
):
    attention, x = make_attention(**switches), make_input(tokens)
    monkeypatch.setattr(attention_module, "LEAST_APART", 1 if within_documents == "one by one" else 100)
    documents = torch.tensor([[0] * 5 + [1] * 8, [0] * 12 + [1]])[:, :tokens]
    expected = naive_attention(attention, x, documents if within_documents else None)
    result = attention(x, documents=Documents.of(documents) if within_documents else None)[0]
    # Rotary tables are float32, as in training.
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    weights, d_result = list(attention.parameters()), torch.randn_like(expected)
    gradients = [torch.autograd.grad(y, weights, d_result) for y in (result, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 4, 6])
@pytest.mark.parametrize("cuts", [[1], [5, 6], [12], [2, 3, 4]])
def test_split_sequence_equals_one_pass(cuts: list[int], window: int | None):
    attention, x = make_attention(num_kv_heads=2, window=window), make_input(13)
    state, parts = attention.initial_state(BATCH), []
    for part in torch.tensor_split(x, cuts):
        y, state = attention(part, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts), attention(x)[0], rtol=1e-9, atol=1e-10)
    assert state.position == 13
    assert state.tensors.k.shape[2] == state.tensors.v.shape[2] == (window or 13)


def test_documents_of_earlier_tokens_are_unknown():
    attention, x = make_attention(), make_input(4)
    _, state = attention(x)
    with pytest.raises(ValueError, match="documents are given"):
        attention(x, state, documents=Documents.whole(BATCH, 4, x.device))


def test_on_a_gpu_a_mask_meets_keys_of_every_head(monkeypatch: pytest.MonkeyPatch):
    # Of torch's kernels those that take a mask refuse shared keys: it would make the matrix of scores.
    given = []
    attention = make_attention(num_kv_heads=2).to("meta")

    def record(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, enable_gqa: bool, **_: object) -> Tensor:
        given.append((k.shape[1], v.shape[1], attn_mask is not None, enable_gqa))
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
    q, k = (torch.empty(BATCH, heads, 3, DIM, device="meta") for heads in (HEADS, 2))
    attention.read(q, k, k, None)
    attention.read(q, k, k, torch.ones(3, 3, dtype=torch.bool, device="meta"))
    assert given == [(2, 2, False, True), (HEADS, HEADS, True, False)]
