"""Gram matrices of inputs: each input that a gradient passes counts once, whatever is split or computed again."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hopescale.config.load import load_recipe
from hopescale.models import Model
from hopescale.optim.gram import accumulate_gram, linear_layers


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_only_a_backward_pass_counts():
    layer, x = nn.Linear(4, 3), randn(7, 4, seed=0)
    handle = accumulate_gram(layer, 10)
    with torch.no_grad():
        layer(x)
    y = layer(x)
    assert getattr(layer.weight, "gram", None) is None
    y.sum().backward()
    torch.testing.assert_close(layer.weight.gram, x.T @ x / 10)
    layer(x.bfloat16().float())[:2].sum().backward()
    assert layer.weight.gram.dtype == torch.float32
    torch.testing.assert_close(layer.weight.gram, x.T @ x / 5, rtol=0.02, atol=0.01)
    before = layer.weight.gram.clone()
    handle.remove()
    layer(x).sum().backward()
    assert torch.equal(layer.weight.gram, before)


def test_gradients_stay_what_they_are_and_places_are_kept():
    x, slope = randn(2, 5, 4, seed=0).requires_grad_(), randn(2, 5, 3, seed=1)
    plain, seen = nn.Linear(4, 3), nn.Linear(4, 3)
    seen.load_state_dict(plain.state_dict())
    accumulate_gram(seen, 1)
    seen.weight.gram = place = torch.zeros(2, 4, 4)[1]
    (expected,) = torch.autograd.grad(plain(x), x, slope)
    plain(x).backward(slope)
    x.grad = None
    seen(x).backward(slope)
    assert torch.equal(x.grad, expected) and torch.equal(seen.weight.grad, plain.weight.grad)
    assert torch.equal(seen.bias.grad, plain.bias.grad)
    assert seen.weight.gram is place
    flat = x.detach().flatten(0, 1)
    torch.testing.assert_close(place, flat.T @ flat)


def note(kept: list[torch.Size], tensor: Tensor) -> Tensor:
    kept.append(tensor.shape)
    return tensor


def test_what_is_computed_again_counts_once_and_is_not_kept():
    x = randn(6, 4, seed=0).requires_grad_()
    grams = []
    for again in (False, True):
        layers = nn.Sequential(nn.Linear(4, 5), nn.SiLU(), nn.Linear(5, 3))
        for parameter, seed in zip(layers.parameters(), range(4), strict=True):
            parameter.data = randn(*parameter.shape, seed=seed)
        for layer in (layers[0], layers[2]):
            accumulate_gram(layer, 6)
        kept: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(note, kept), lambda tensor: tensor):
            y = checkpoint(layers, x, use_reentrant=False) if again else layers(x)
        assert again == ((6, 5) not in kept)
        y.sum().backward()
        grams.append([layers[0].weight.gram, layers[2].weight.gram])
    for once, twice in zip(*grams, strict=True):
        assert torch.equal(once, twice)


def test_parts_are_made_whole():
    """Tokens that are split add up; columns that are split are the columns of the whole."""
    x = randn(3, 2, 4, seed=0)
    flat, layer = x.flatten(0, 1), nn.Linear(4, 3)
    accumulate_gram(layer, 6, all_tokens=lambda part: torch.cat([part, x[1:]]))
    layer(x[:1]).sum().backward()
    torch.testing.assert_close(layer.weight.gram, flat.T @ flat / 6)
    narrow = nn.Linear(2, 3)
    accumulate_gram(narrow, 6, all_columns=lambda part: torch.cat([part, x[..., 2:]], dim=-1))
    narrow(x[..., :2]).sum().backward()
    torch.testing.assert_close(narrow.weight.gram, (flat.T @ flat / 6)[:, :2])


def test_every_matrix_of_a_model_but_embedding_and_memories_has_inputs():
    config = load_recipe("debug", ["model.tie_embeddings=true"]).config
    grams: list[dict[str, Tensor]] = []
    for again in ("none", "chunks", "memory", "block"):
        model = Model(config.model, seed=1, recompute=again)
        for layer in linear_layers(model).values():
            accumulate_gram(layer, 24)
        model(torch.arange(24).view(2, 12))[0].logsumexp(-1).sum().backward()
        grams.append({name: p.gram for name, p in model.named_parameters() if hasattr(p, "gram")})
        assert grams[-1].keys() == linear_layers(model).keys()
    matrices = ("_proj.weight", ".gate.weight", ".up.weight", ".down.weight")
    assert grams[0].keys() == {name for name, _ in model.named_parameters() if name.endswith(matrices)}
    for again in grams[1:]:
        for name, gram in grams[0].items():
            torch.testing.assert_close(again[name], gram, rtol=1e-5, atol=1e-6)
    gate, up = (grams[0][f"blocks.0.cms.levels.fast.{name}.weight"] for name in ("gate", "up"))
    assert torch.equal(gate, up)
    # What comes from a norm has a mean square of about 1.
    assert gate.trace() == pytest.approx(config.model.d_model, rel=0.05)
