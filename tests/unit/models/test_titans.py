"""Titans' MAC, MAG and MAL against their equations, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hopescale.config.schema.titans import TitansConfig
from hopescale.models.titans import Titans
from hopescale.ops.cpp import build
from hopescale.ops.documents import Documents
from hopescale.ops.self_modifying import chunked
from tests.support.properties import check_causal, check_parts, check_trained
from tests.support.titans import MODEL, SYSTEMS, make_mixer, naive_layer

BATCH = 2
every_system = pytest.mark.parametrize("config", SYSTEMS.values(), ids=SYSTEMS)


def randn(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal_up_to_rounding(actual: Tensor, expected: Tensor, tolerance: float = 1e-7) -> None:
    scale = float(expected.detach().abs().max()) + 1e-9
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=tolerance)


def outputs_and_gradients(function, mixer: Titans, x: Tensor) -> list[Tensor]:
    y = function(x)
    inputs = [x, *mixer.parameters()]
    grads = torch.autograd.grad((y * randn(*y.shape, seed=6)).sum(), inputs, allow_unused=True, materialize_grads=True)
    return [y, *grads]


@every_system
@pytest.mark.parametrize("tokens", [1, 3, 21])
def test_the_layer_equals_its_equations(config: TitansConfig, tokens: int):
    mixer, x = make_mixer(config), randn(tokens, BATCH, MODEL.d_model).requires_grad_()
    found = outputs_and_gradients(lambda x: mixer(x)[0], mixer, x)
    wanted = outputs_and_gradients(lambda x: naive_layer(mixer, x), mixer, x)
    for actual, expected in zip(found, wanted, strict=True):
        assert_equal_up_to_rounding(actual, expected, 1e-5)  # tables of rotations are float32


@every_system
def test_every_parameter_gets_a_gradient(config: TitansConfig):
    check_trained(make_mixer(config), randn(20, BATCH, MODEL.d_model))


@every_system
@pytest.mark.parametrize("cuts", [(7,), (8, 16), (1, 2, 3, 20)])
def test_a_split_sequence_equals_one_pass(config: TitansConfig, cuts: tuple[int, ...]):
    check_parts(make_mixer(config), randn(23, BATCH, MODEL.d_model), cuts)


@every_system
def test_a_later_token_changes_no_earlier_output_and_no_other_row(config: TitansConfig):
    check_causal(make_mixer(config), randn(24, BATCH, MODEL.d_model), 13)


@every_system
@pytest.mark.parametrize("lengths", [[1, 2, 17, 1, 3, 16], [16, 8, 15, 1]], ids=str)
def test_packed_documents_equal_documents_apart(config: TitansConfig, lengths: list[int]):
    mixer, rows = make_mixer(config), [lengths, [sum(lengths[:2]), *lengths[2:]]]
    x = randn(sum(lengths), BATCH, MODEL.d_model).requires_grad_()
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])

    def apart(x: Tensor) -> Tensor:
        parts = [x[:, n : n + 1].split(row) for n, row in enumerate(rows)]
        return torch.cat([torch.cat([mixer(part)[0] for part in row]) for row in parts], dim=1)

    found = outputs_and_gradients(lambda x: mixer(x, documents=Documents.of(ids))[0], mixer, x)
    for actual, expected in zip(found, outputs_and_gradients(apart, mixer, x), strict=True):
        assert_equal_up_to_rounding(actual, expected)


@every_system
def test_the_memory_after_documents_is_that_of_the_last_ones(config: TitansConfig):
    mixer, x = make_mixer(config), randn(20, BATCH, MODEL.d_model)
    ids = torch.stack([torch.repeat_interleave(torch.arange(2), torch.tensor(row)) for row in ([5, 15], [12, 8])])
    probe: dict[str, Tensor] = {}
    found = mixer(x, documents=Documents.of(ids), probe=probe)[1].named()
    assert set(probe) == {"eta_mean", "alpha_mean", "surprise", "state_norm", "tokens"}
    for row, begin in enumerate((5, 12)):
        last = mixer(x[begin:, row : row + 1])[1].named()
        for name, tensor in found.items():
            if name.startswith("memory/memory/running") or name.endswith("tail"):
                assert_equal_up_to_rounding(tensor[row : row + 1], last[name])


@pytest.mark.skipif(build.problem() is not None, reason="no C++ compiler could build the library")
@pytest.mark.parametrize("name", ["MAC", "MAG", "MAL"])
def test_the_memory_runs_in_one_operation(name: str, monkeypatch: pytest.MonkeyPatch):
    """In float32, and with widths that the C++ has; MAC calls it once for each segment."""
    config, model = replace(SYSTEMS[name], memory_dim=None), replace(MODEL, head_dim=16)
    mixer, x = make_mixer(config, model=model), randn(21, BATCH, model.d_model).requires_grad_()
    expected = outputs_and_gradients(lambda x: mixer(x)[0], mixer, x)
    mixer = mixer.float()
    monkeypatch.setattr(chunked, "scan", lambda *_, **__: pytest.fail("the chunks were run one by one"))
    found = outputs_and_gradients(lambda x: mixer(x)[0], mixer, x.detach().float().requires_grad_())
    for actual, exact in zip(found, expected, strict=True):
        assert_equal_up_to_rounding(actual.double(), exact, 3e-4)
