"""Initial values by name, seed and place in the whole parameter: those of a rank's slice are drawn without the rest."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import nn

from hopescale.models import Model
from hopescale.models.init import initial_values
from hopescale.models.linear_attention import _bias_of_step, _log_of_rate
from hopescale.ops.draws import RandomBits
from hopescale.parallel.layers import ParameterSpec, attach
from tests.support.many_ranks import Group, mesh_of
from tests.support.models import BASE

SHAPE = (8, 12, 12)
SPECS = {
    "normal": {"std": 0.3, "mean": 2.0},
    "constant": {"mean": 0.25},
    "identity": {"std": 0.02, "identity": True},
    "rates": {"of_uniform": partial(_log_of_rate, low=1.0, high=16.0)},
    "steps": {"of_uniform": partial(_bias_of_step, low=-6.9, high=-2.3)},
}
ALONE = mesh_of(Group(1))


def split(size: int, rank: int):
    return replace(ALONE, tp_group=Group(size, rank))


def parameter_of(kind: str, dim: int | None, tp: int = 1) -> nn.Parameter:
    shape = [size // tp if number == dim else size for number, size in enumerate(SHAPE)]
    return attach(nn.Parameter(torch.empty(shape)), ParameterSpec(partition_dim=dim, **SPECS[kind]))


@pytest.fixture
def positions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note where numbers are drawn."""
    at, found = RandomBits.at, []

    def noted(bits: RandomBits, runs) -> torch.Tensor:
        runs = list(runs)
        found.extend(place for run in runs for place in run)
        return at(bits, runs)

    monkeypatch.setattr(RandomBits, "at", noted)
    return found


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dim", [None, 0, 1, 2])
@pytest.mark.parametrize("kind", SPECS)
def test_a_slice_is_that_of_the_whole(kind: str, dim: int | None, tp: int, positions: list[int]):
    whole = initial_values("a", parameter_of(kind, dim), 3, ALONE, range(8 * 144)).view(SHAPE)
    of_all = sorted(positions)
    assert of_all == ([] if kind == "constant" else [*range(8 * 144)])
    positions.clear()
    for rank in range(tp):
        parameter, mesh = parameter_of(kind, dim, tp), split(tp, rank)
        draw = partial(initial_values, "a", parameter, 3, mesh)
        own = whole if dim is None else whole.chunk(tp, dim)[rank]
        values = draw(range(parameter.numel()))
        assert values.dtype == torch.float32 and values.equal(own.flatten())
        for entries in (range(5, 5), range(7, 61), range(1, parameter.numel() - 1), range(36, 72)):
            assert draw(entries).equal(own.flatten()[entries.start : entries.stop]), entries
        positions.clear()
        draw(range(10, 100))
        assert len(positions) == (0 if kind == "constant" else 90), "no others are drawn"


def test_all_ranks_together_draw_each_entry_once(positions: list[int]):
    for rank in range(4):
        parameter = parameter_of("normal", 2, 4)
        initial_values("a", parameter, 3, split(4, rank), range(parameter.numel()))
    assert sorted(positions) == [*range(8 * 144)]


def test_pieces_that_are_drawn_at_a_time_change_nothing():
    draw = partial(initial_values, "a", parameter_of("normal", 1, 2), 3, split(2, 1), range(3, 570))
    values = draw()
    with patch("hopescale.models.init.DRAWN_AT_A_TIME", 50):
        assert draw().equal(values)


def test_values_are_as_the_spec_says():
    parameter = nn.Parameter(torch.empty(2, 512, 512))

    def draw(name: str, seed: int, **spec: object) -> torch.Tensor:
        attach(parameter, ParameterSpec(std=0.3, **spec))
        return initial_values(name, parameter, seed, ALONE, range(parameter.numel())).view_as(parameter)

    values = draw("a", 0)
    assert values.mean().item() == pytest.approx(0.0, abs=5 * 0.3 / 700)
    assert values.std().item() == pytest.approx(0.3, rel=5 / 1000)
    torch.testing.assert_close(draw("a", 0, mean=2.0, identity=True), values + 2 + torch.eye(512), rtol=0, atol=1e-6)
    assert not draw("b", 0).equal(values) and not draw("a", 1).equal(values)


@pytest.mark.parametrize("kind", ["rates", "steps"])
def test_what_begins_evenly_lies_between_its_ends(kind: str):
    values = initial_values("a", parameter_of(kind, None), 0, ALONE, range(8 * 144)).double()
    u = (values.exp() - 1) / 15 if kind == "rates" else (nn.functional.softplus(values).log() + 6.9) / 4.6
    assert 0 <= u.min() < 0.01 and 0.99 < u.max() <= 1.0001
    assert u.mean().item() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("tp", [2, 4])
def test_the_slices_of_a_model_make_the_model(tp: int):
    whole = Model(BASE, seed=5)
    parts = [Model(BASE, seed=5, mesh=split(tp, rank)) for rank in range(tp)]
    for (name, parameter), *own in zip(whole.named_parameters(), *(p.parameters() for p in parts), strict=True):
        dim = parameter.spec.partition_dim
        for rank, part in enumerate(own):
            expected = parameter if dim is None else parameter.chunk(tp, dim)[rank]
            assert part.shape == expected.shape and part.equal(expected), name
