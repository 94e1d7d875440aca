"""TTT-Linear and TTT-MLP against their equations, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hopescale.config.schema.ttt import TttConfig
from hopescale.config.ttt import ttt_problems
from hopescale.models.init import initialize
from hopescale.models.ttt import Ttt
from hopescale.ops.documents import Documents
from hopescale.parallel.mesh import Mesh
from tests.support.properties import check_causal, check_parts, check_trained
from tests.support.ttt import MODEL, SYSTEMS, make_mixer, naive_layer

BATCH = 2
every_system = pytest.mark.parametrize("config", SYSTEMS.values(), ids=SYSTEMS)


def randn(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal_up_to_rounding(actual: Tensor, expected: Tensor, tolerance: float = 1e-7) -> None:
    scale = float(expected.detach().abs().max()) + 1e-9
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=tolerance)


def outputs_and_gradients(function, mixer: Ttt, x: Tensor) -> list[Tensor]:
    y = function(x)
    return [y, *torch.autograd.grad((y * randn(*y.shape, seed=6)).sum(), [x, *mixer.parameters()])]


@every_system
@pytest.mark.parametrize("tokens", [1, 3, 37])
def test_the_layer_equals_its_equations(config: TttConfig, tokens: int):
    mixer, x = make_mixer(config), randn(tokens, BATCH, MODEL.d_model).requires_grad_()
    found = outputs_and_gradients(lambda x: mixer(x)[0], mixer, x)
    wanted = outputs_and_gradients(lambda x: naive_layer(mixer, x), mixer, x)
    for actual, expected in zip(found, wanted, strict=True):
        # Tables of rotations are float32.
        assert_equal_up_to_rounding(actual, expected, 5e-6 if len(x) > 1 else 1e-7)


@every_system
def test_every_parameter_gets_a_gradient(config: TttConfig):
    check_trained(make_mixer(config), randn(20, BATCH, MODEL.d_model))


@every_system
@pytest.mark.parametrize("cuts", [(7,), (16, 32), (1, 2, 3, 40)])
def test_a_split_sequence_equals_one_pass(config: TttConfig, cuts: tuple[int, ...]):
    check_parts(make_mixer(config), randn(41, BATCH, MODEL.d_model), cuts)


@every_system
def test_a_later_token_changes_no_earlier_output_and_no_other_row(config: TttConfig):
    check_causal(make_mixer(config), randn(40, BATCH, MODEL.d_model), 21)


@every_system
@pytest.mark.parametrize("lengths", [[1, 2, 17, 1, 3, 16], [16, 8, 15, 1]], ids=str)
def test_packed_documents_equal_documents_apart(config: TttConfig, lengths: list[int]):
    mixer, rows = make_mixer(config), [lengths, lengths[::-1]]
    x = randn(sum(lengths), BATCH, MODEL.d_model).requires_grad_()
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])

    def apart(x: Tensor) -> Tensor:
        columns = [
            torch.cat([mixer(part)[0] for part in x[:, row : row + 1].split(own)]) for row, own in enumerate(rows)
        ]
        return torch.cat(columns, dim=1)

    found = outputs_and_gradients(lambda x: mixer(x, documents=Documents.of(ids))[0], mixer, x)
    for actual, expected in zip(found, outputs_and_gradients(apart, mixer, x), strict=True):
        assert_equal_up_to_rounding(actual, expected)
    state = mixer(x, documents=Documents.of(ids))[1].named()
    for row, own in enumerate(rows):
        for name, tensor in mixer(x[-own[-1] :, row : row + 1])[1].named().items():
            assert_equal_up_to_rounding(state[name][row : row + 1], tensor)


def test_documents_are_refused_after_earlier_tokens():
    mixer = make_mixer(SYSTEMS["TTT-Linear"])
    _, state = mixer(randn(3, 1, MODEL.d_model))
    with pytest.raises(ValueError, match="the tokens in the state are unknown"):
        mixer(randn(2, 1, MODEL.d_model), state, documents=Documents.of(torch.zeros(1, 2, dtype=torch.long)))


def test_a_fresh_layer_learns_while_it_reads():
    mixer = Ttt(MODEL, TttConfig(conv_width=None, gate=False), out_std=0.3, mesh=Mesh.alone())
    initialize(mixer, 0, Mesh.alone())
    probe: dict[str, Tensor] = {}
    _, state = mixer(randn(64, 1, MODEL.d_model).float(), probe=probe)
    start = mixer.initial_state(1).tensors.memory.weights
    assert 0.3 < probe["eta_mean"] < 0.7
    assert (state.tensors.memory.weights.w1 - start.w1).norm() > 0.1 * start.w1.norm()


def test_low_precision_weights_keep_memories_in_float32():
    mixer, low = make_mixer(SYSTEMS["TTT-MLP"]), make_mixer(SYSTEMS["TTT-MLP"]).float()
    for parameter in low.parameters():
        if not parameter.spec.keep_fp32:
            parameter.data = parameter.data.bfloat16()
    x = randn(40, BATCH, MODEL.d_model)
    y, state = low(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert {tensor.dtype for name, tensor in state.named().items() if name != "conv_tail"} == {torch.float32}
    wanted = mixer(x)[0].detach()
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=0.1 * float(wanted.abs().max()))


def test_what_does_not_fit_is_named():
    problems = list(ttt_problems(replace(MODEL, head_dim=5), TttConfig(memory_dim=3), "model.mixers.a"))
    assert [problem.key for problem in problems] == ["model.head_dim", "model.mixers.a.memory_dim"]
    assert [p for config in SYSTEMS.values() for p in ttt_problems(MODEL, config, "m")] == []
