"""Slices of a model in a chain equal the whole model, and each holds what is its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hopescale.config.schema import ModelConfig
from hopescale.models import Model
from hopescale.parallel.layers import cross_entropy_sum
from tests.support.models import BASE

CONFIG = replace(BASE, num_layers=3)
CUTS = {"two": [range(2), range(2, 3)], "three": [range(1), range(1, 2), range(2, 3)]}
TOKENS = torch.randint(0, 200, (2, 21), generator=torch.Generator().manual_seed(1))


def chain(slices: list[Model], probe: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    output, _ = slices[0](TOKENS[:, :-1], probe=probe)
    for part in slices[1:]:
        output, _ = part(None, hidden=output, probe=probe)
    return output


def cut(config: ModelConfig, blocks: list[range]) -> list[Model]:
    return [Model(config, seed=2, blocks=part) for part in blocks]


def backward(model: Model, logits: torch.Tensor) -> torch.Tensor:
    loss = cross_entropy_sum(logits, TOKENS[:, 1:], model.mesh)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("blocks", CUTS.values(), ids=CUTS)
def test_chained_slices_equal_the_whole_model(blocks: list[range], tied: bool):
    config = replace(CONFIG, tie_embeddings=tied)
    whole, slices = Model(config, seed=2), cut(config, blocks)
    seen: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    loss = backward(slices[-1], chain(slices, seen))
    assert loss == backward(whole, whole(TOKENS[:, :-1], probe=expected)[0])
    gradients: dict[str, torch.Tensor] = {}
    for part in slices:
        for name, parameter in part.named_parameters():
            gradients[name] = gradients.get(name, 0) + parameter.grad
    assert list(gradients) == [name for name, _ in whole.named_parameters()]
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-6, atol=1e-7)
    assert seen.keys() == expected.keys() and all(torch.equal(seen[name], expected[name]) for name in seen)


@pytest.mark.parametrize("tied", [True, False])
def test_slices_hold_the_whole_model_and_a_tied_embedding_twice(tied: bool):
    config = replace(CONFIG, tie_embeddings=tied)
    slices, whole = cut(config, CUTS["three"]), dict(Model(config, seed=2).named_parameters())
    held = [name for part in slices for name, _ in part.named_parameters()]
    assert sorted(held) == sorted([*whole, *(["embedding.weight"] if tied else [])])
    for part in slices:
        assert all(torch.equal(parameter, whole[name]) for name, parameter in part.named_parameters())
    assert [(part.is_first, part.is_last) for part in slices] == [(True, False), (False, False), (False, True)]


def test_a_slice_knows_its_levels_and_its_states():
    _, middle, _ = cut(CONFIG, CUTS["three"])
    names = ["gate", "up", "down"]
    assert middle.level_parameters() == {
        level: [f"blocks.1.cms.levels.{level}.{name}.weight" for name in ("norm", *names)] for level in ("fast", "slow")
    }
    assert len(middle.initial_state(2).layers) == 1
    hidden, state = middle(None, middle.initial_state(2), hidden=torch.randn(5, 2, 32))
    assert hidden.shape == (5, 2, 32)
    assert state.position == 5


def test_hidden_goes_where_no_tokens_are_read():
    first, _, last = cut(CONFIG, CUTS["three"])
    hidden = torch.zeros(20, 2, 32)
    with pytest.raises(ValueError, match="hidden is missing"):
        last(TOKENS)
    with pytest.raises(ValueError, match="reads tokens"):
        first(TOKENS, hidden=hidden)
    with pytest.raises(ValueError, match="reads tokens"):
        first(None)


@pytest.mark.parametrize("blocks", [range(0), range(4), range(-1, 2), range(0, 3, 2), range(3, 4)], ids=str)
def test_blocks_the_model_does_not_have_are_refused(blocks: range):
    with pytest.raises(ValueError, match="not consecutive blocks of a model of 3"):
        Model(CONFIG, blocks=blocks)
