"""Counts against the operations that torch executes, whatever the mixer's settings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hopescale.config.load import load_recipe
from hopescale.config.schema import ModelConfig
from hopescale.cost.flops import flops_by_part, flops_per_token
from hopescale.models import Model
from hopescale.parallel.layers import cross_entropy_sum
from tests.support.mixers import MIXERS

aten = torch.ops.aten
SHORT, SEQ_LEN, BATCH = 64, 128, 1
SMALL = ("model.d_model=48", "model.head_dim=24", "model.mixers.hope.chunk_size=16", "model.vocab_size=128")
CASES = MIXERS | {
    "momentum of static values": ["model.mixers.hope={memory: linear, adaptive: [], targets: value, objective: dot}"],
}
RECOMPUTED = {
    "hope": ["chunks", "reverse", "memory", "block"],
    "linear": ["chunks", "reverse"],
    "no momentum": ["reverse"],
    "two banks": ["chunks", "memory"],
    "deltanet": ["chunks", "block"],
    "attention": ["memory", "block"],
    "sliding window": ["memory"],
}
"""Mixers, and how their activations are computed again: each way with what it treats apart."""


def attention(products: float):
    def count(q: tuple, k: tuple, v: tuple, *_: Any, attn_mask: tuple | None = None, **__: Any) -> float:
        batch, heads, tokens, dim = q
        pairs = tokens * (tokens + 1) / 2 if attn_mask is None else tokens * k[2]
        return products * 2 * batch * heads * dim * pairs

    return count


def executed(overrides: list[str], recompute: str, seq_len: int) -> float:
    """Operations that torch counts, told of what it does not know: solves, and attention on a CPU."""
    config = load_recipe("debug", [*SMALL, *overrides]).config.model
    model = Model(config, recompute=recompute)
    tokens = torch.randint(config.vocab_size, (BATCH, seq_len))
    backward = attention(5)
    counts = {
        aten.linalg_solve_triangular: lambda a, b, **_: a[-1] * math.prod(b),
        aten._scaled_dot_product_flash_attention_for_cpu: attention(2),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, *shapes, **mask: backward(
            *shapes, **mask
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=counts) as counter:
        cross_entropy_sum(model(tokens)[0], tokens, model.mesh).backward()
    return counter.get_total_flops()


def counted(model: ModelConfig, seq_len: int, recompute: str) -> float:
    return seq_len * sum(
        part.total for part in flops_by_part(model, seq_len, recompute=lambda mixer: recompute).values()
    )


def of_more_tokens(count: Callable[[int], float]) -> float:
    """Difference that more tokens make: what the first chunk lacks, and the last, is the same in both."""
    return count(SEQ_LEN) - count(SHORT)


def config_of(overrides: list[str]):
    return load_recipe("debug", [*SMALL, *overrides]).config.model


@pytest.mark.parametrize("overrides", CASES.values(), ids=CASES)
def test_model_flops_are_what_torch_executes(overrides: list[str]):
    model = config_of(overrides)
    expected = of_more_tokens(lambda seq_len: counted(model, seq_len, "none"))
    assert of_more_tokens(lambda seq_len: executed(overrides, "none", seq_len)) == pytest.approx(expected, rel=0.01)
    if all(mixer.kind == "self_modifying" for mixer in model.mixers.values()):
        assert flops_per_token(model, SEQ_LEN) * SEQ_LEN == counted(model, SEQ_LEN, "none")


@pytest.mark.parametrize(("mixer", "recompute"), [(mixer, how) for mixer, hows in RECOMPUTED.items() for how in hows])
def test_recomputation_is_counted_as_executed(mixer: str, recompute: str):
    model = config_of(MIXERS[mixer])
    expected = of_more_tokens(lambda seq_len: counted(model, seq_len, recompute))
    measured = of_more_tokens(lambda seq_len: executed(MIXERS[mixer], recompute, seq_len))
    assert measured == pytest.approx(expected, rel=0.03 if recompute == "reverse" else 0.01)


def test_a_short_sequence_that_ends_within_a_chunk_lacks_little():
    for overrides in ([], MIXERS["deltanet"], ["model.mixers.hope={reset_every: 32, far: {chunk_size: 32}}"]):
        expected = counted(config_of(overrides), 75, "none")
        assert executed(overrides, "none", 75) == pytest.approx(expected, rel=0.05)


def test_of_attention_the_model_counts_no_score_twice():
    model = config_of(MIXERS["attention"])
    scores = model.num_layers * 2 * model.num_heads * 24 * (SEQ_LEN + 1) / 2 * 2
    difference = counted(model, SEQ_LEN, "none") / SEQ_LEN - flops_per_token(model, SEQ_LEN)
    assert difference == pytest.approx(0.5 * scores)
