from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hopescale.common.errors import ConfigError
from hopescale.infer.sampling import Sampling, sample

PROBABILITIES = [0.1, 0.4, 0.05, 0.3, 0.15]
LOGITS = torch.tensor(PROBABILITIES).log() + 3.0
DRAWS = 4000


def draw(sampling: Sampling, seed: int = 0, logits: Tensor = LOGITS) -> Tensor:
    """Relative frequencies of the tokens over many rows drawn at once."""
    tokens = sample(logits.expand(DRAWS, -1), sampling, torch.Generator().manual_seed(seed))
    return torch.bincount(tokens, minlength=logits.shape[-1]) / DRAWS


def renormalised(*kept: int) -> Tensor:
    chances = torch.tensor([p if i in kept else 0.0 for i, p in enumerate(PROBABILITIES)])
    return chances / chances.sum()


def assert_frequencies(found: Tensor, expected: Tensor) -> None:
    assert (found[expected == 0] == 0).all(), found
    torch.testing.assert_close(found, expected, atol=0.03, rtol=0)


def test_greedy_takes_the_likeliest_of_each_row_and_draws_nothing():
    logits = torch.stack([LOGITS, LOGITS.flip(0), -LOGITS])
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    token = sample(logits, Sampling(), generator)
    assert token.tolist() == [1, 3, 2] and token.dtype == torch.int64
    assert torch.equal(generator.get_state(), before)


def test_temperature_one_draws_by_the_model():
    assert_frequencies(draw(Sampling(1.0)), torch.tensor(PROBABILITIES))


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature: float):
    assert_frequencies(draw(Sampling(temperature)), (LOGITS / temperature).softmax(-1))


def test_a_temperature_near_zero_is_greedy():
    assert draw(Sampling(1e-3))[1] == 1


@pytest.mark.parametrize(("top_k", "kept"), [(1, (1,)), (2, (1, 3)), (3, (1, 3, 4)), (5, range(5)), (99, range(5))])
def test_top_k_keeps_so_many(top_k: int, kept):
    assert_frequencies(draw(Sampling(1.0, top_k=top_k)), renormalised(*kept))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.01, (1,)),
        (0.39, (1,)),
        (0.41, (1, 3)),
        (0.69, (1, 3)),
        (0.71, (1, 3, 4)),
        (0.9, (0, 1, 3, 4)),
        (1.0, range(5)),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept):
    assert_frequencies(draw(Sampling(1.0, top_p=top_p)), renormalised(*kept))


def test_top_p_looks_at_what_top_k_left():
    """Of 0.4 and 0.3 the first alone is 0.57 of the rest."""
    assert_frequencies(draw(Sampling(1.0, top_k=2, top_p=0.55)), renormalised(1))
    assert_frequencies(draw(Sampling(1.0, top_k=2, top_p=0.6)), renormalised(1, 3))


def test_every_row_is_cut_by_itself():
    logits = torch.stack([LOGITS, LOGITS.flip(0)]).repeat(500, 1)
    tokens = sample(logits, Sampling(1.0, top_k=1), torch.Generator())
    assert tokens.tolist() == [1, 3] * 500


def test_the_seed_decides():
    first, again, other = (draw(Sampling(1.0), seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"top_p": 0.9}])
def test_padding_of_the_vocabulary_is_never_drawn(settings: dict):
    logits = torch.cat([LOGITS, torch.full((3,), -math.inf)])
    assert draw(Sampling(1.0, **settings), logits=logits)[5:].sum() == 0
    assert sample(logits[None], Sampling(), torch.Generator()).item() == 1


def test_low_precision_logits_are_drawn_in_float32():
    assert_frequencies(draw(Sampling(1.0), logits=LOGITS.bfloat16()), torch.tensor(PROBABILITIES))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": -0.1}, "--temperature is -0.1"),
        ({"temperature": math.nan}, "--temperature is nan"),
        ({"temperature": math.inf}, "--temperature is inf"),
        ({"temperature": 1.0, "top_k": 0}, "--top-k is 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "--top-p is 1.1"),
        ({"temperature": 1.0, "top_p": math.nan}, "--top-p is nan"),
        ({"top_k": 3}, "no effect at --temperature 0"),
        ({"top_p": 0.9}, "no effect at --temperature 0"),
    ],
)
def test_values_out_of_range_are_refused(settings: dict, said: str):
    with pytest.raises(ConfigError, match=said) as caught:
        Sampling(**settings)
    assert caught.value.exit_code == 2
