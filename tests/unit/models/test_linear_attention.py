"""RetNet, DeltaNet, Gated DeltaNet and Mamba-2 against their equations, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hopescale.config.linear_attention import linear_attention_problems
from hopescale.config.schema.linear_attention import LinearAttentionConfig
from hopescale.models.init import initialize
from hopescale.models.linear_attention import LinearAttention
from hopescale.ops.documents import Documents
from hopescale.parallel.mesh import Mesh
from tests.support.linear_attention import MODEL, SYSTEMS, make_mixer, naive_layer
from tests.support.properties import check_causal, check_parts, check_trained

BATCH = 2
every_system = pytest.mark.parametrize("config", SYSTEMS.values(), ids=SYSTEMS)


def randn(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_equal_up_to_rounding(actual: Tensor, expected: Tensor, tolerance: float = 1e-7) -> None:
    scale = float(expected.detach().abs().max()) + 1e-9
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=tolerance)


def outputs_and_gradients(function, mixer: LinearAttention, x: Tensor) -> list[Tensor]:
    y = function(x)
    gradients = torch.autograd.grad((y * randn(*y.shape, seed=6)).sum(), [x, *mixer.parameters()])
    return [y, *gradients]


@every_system
@pytest.mark.parametrize("tokens", [1, 3, 37])
def test_the_layer_equals_its_equations(config: LinearAttentionConfig, tokens: int):
    mixer, x = make_mixer(config), randn(tokens, BATCH, MODEL.d_model).requires_grad_()
    found = outputs_and_gradients(lambda x: mixer(x)[0], mixer, x)
    wanted = outputs_and_gradients(lambda x: naive_layer(mixer, x), mixer, x)
    for actual, expected in zip(found, wanted, strict=True):
        # Tables of rotations are float32.
        assert_equal_up_to_rounding(actual, expected, 5e-6 if config.rotary else 1e-7)


@every_system
def test_every_parameter_gets_a_gradient(config: LinearAttentionConfig):
    check_trained(make_mixer(config), randn(20, BATCH, MODEL.d_model))


@every_system
@pytest.mark.parametrize("cuts", [(7,), (16, 32), (1, 2, 3, 40)])
def test_a_split_sequence_equals_one_pass(config: LinearAttentionConfig, cuts: tuple[int, ...]):
    check_parts(make_mixer(config), randn(41, BATCH, MODEL.d_model), cuts)


@every_system
def test_a_later_token_changes_no_earlier_output_and_no_other_row(config: LinearAttentionConfig):
    check_causal(make_mixer(config), randn(40, BATCH, MODEL.d_model), 21)


LENGTHS = ([1, 2, 17, 1, 3, 16], [16, 8, 15, 1], [40])


@every_system
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_documents_equal_documents_apart(config: LinearAttentionConfig, lengths: list[int]):
    """Outputs, every gradient, and the state after the last document; the rows of a batch end documents elsewhere."""
    mixer, rows = make_mixer(config), [lengths, lengths[::-1]]
    x = randn(sum(lengths), BATCH, MODEL.d_model).requires_grad_()
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])

    def apart(x: Tensor) -> Tensor:
        columns = []
        for row, own in enumerate(rows):
            parts = [mixer(part)[0] for part in x[:, row : row + 1].split(own)]
            columns.append(torch.cat(parts))
        return torch.cat(columns, dim=1)

    found = outputs_and_gradients(lambda x: mixer(x, documents=Documents.of(ids))[0], mixer, x)
    for actual, expected in zip(found, outputs_and_gradients(apart, mixer, x), strict=True):
        assert_equal_up_to_rounding(actual, expected)
    state = mixer(x, documents=Documents.of(ids))[1].named()
    for row, own in enumerate(rows):
        alone = mixer(x[-own[-1] :, row : row + 1])[1].named()
        for name, tensor in alone.items():
            assert_equal_up_to_rounding(state[name][row : row + 1], tensor)


def test_packed_documents_equal_documents_apart_in_float32():
    for name in ("Gated DeltaNet", "Mamba-2", "RetNet"):
        mixer, lengths = make_mixer(SYSTEMS[name]).float(), [5, 64, 1, 60]
        x = randn(130, 1, MODEL.d_model).float()
        ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
        packed = mixer(x, documents=Documents.of(ids))[0]
        wanted = torch.cat([mixer(part)[0] for part in x.split(lengths)])
        torch.testing.assert_close(packed, wanted, rtol=0, atol=1e-6 * float(wanted.detach().abs().max()))


def test_documents_are_refused_after_earlier_tokens():
    mixer = make_mixer(SYSTEMS["DeltaNet"])
    _, state = mixer(randn(3, 1, MODEL.d_model))
    with pytest.raises(ValueError, match="the tokens in the state are unknown"):
        mixer(randn(2, 1, MODEL.d_model), state, documents=Documents.of(torch.zeros(1, 2, dtype=torch.long)))


def test_low_precision_weights_keep_memories_and_gates_in_float32():
    mixer = make_mixer(SYSTEMS["Mamba-2"])
    low = make_mixer(SYSTEMS["Mamba-2"]).float()
    for parameter in low.parameters():
        if not parameter.spec.keep_fp32:
            parameter.data = parameter.data.bfloat16()
    x = randn(40, BATCH, MODEL.d_model)
    y, state = low(x.bfloat16())
    assert y.dtype == torch.bfloat16 and state.tensors.memory.dtype == torch.float32
    torch.testing.assert_close(y.double(), mixer(x)[0], rtol=0, atol=0.05 * float(mixer(x)[0].detach().abs().max()))


def test_fresh_gates_start_as_published():
    mixer = LinearAttention(
        MODEL, LinearAttentionConfig(num_heads=400, step_max=0.2, skip=True), out_std=0.1, mesh=Mesh.alone()
    )
    initialize(mixer, 0, Mesh.alone())
    rate, step = mixer.gates["A_log"].exp(), torch.nn.functional.softplus(mixer.gates["dt_bias"])
    assert 1 <= rate.min() < 1.5 and 15.5 < rate.max() <= 16.001
    assert 0.00099 < step.min() < 0.0011 and 0.18 < step.max() < 0.2001
    assert abs(float(step.detach().log().mean()) - float(torch.tensor([0.001, 0.2]).log().mean())) < 0.3
    assert bool((mixer.gates["D"] == 1).all())


def test_a_wider_mixer_starts_with_an_output_of_the_same_size():
    stds = {}
    for heads in (4, 64):
        mixer = LinearAttention(MODEL, LinearAttentionConfig(num_heads=heads), out_std=0.1, mesh=Mesh.alone())
        initialize(mixer, 0, Mesh.alone())
        stds[heads] = float(mixer.out_proj.weight.detach().std())
    assert stds[4] == pytest.approx(0.1, rel=0.1)
    assert stds[64] == pytest.approx(0.025, rel=0.1)


def test_a_probe_is_filled_with_means():
    probe: dict[str, Tensor] = {}
    make_mixer(SYSTEMS["Gated DeltaNet"])(randn(9, BATCH, MODEL.d_model), probe=probe)
    assert set(probe) == {"alpha_mean", "eta_mean"} and all(0 < mean < 1 for mean in probe.values())
    make_mixer(SYSTEMS["RetNet"])(randn(9, BATCH, MODEL.d_model), probe=(nothing := {}))
    assert nothing == {}


@pytest.mark.parametrize(
    ("changes", "key", "message"),
    [
        ({"key_groups": 8}, "key_groups", "8 does not divide the mixer's 4 heads"),
        ({"key_groups": 1}, "key_groups", "1 is not a multiple of parallel.tp = 2"),
        ({"conv_width": None, "conv_bias": True}, "conv_bias", "has no effect"),
        ({"rotary": True, "key_dim": 5}, "rotary", "needs an even key_dim, it is 5"),
        ({"decay": "none", "write": "step", "erase": False}, "write", "step needs decay: input"),
        ({"write": "step"}, "erase", "does not go with write: step"),
        ({"key_norm": "none"}, "erase", "needs keys of unit length"),
        ({"norm": "group"}, "norm_weight", "shared needs norm: head"),
        ({"a_min": 17.0}, "a_min", "17 is above a_max = 16"),
        ({"step_min": 0.5}, "step_min", "0.5 is above step_max = 0.1"),
        ({"decay": "none", "a_max": 3.0}, "a_max", "has no effect: decay is none"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict, key: str, message: str):
    problems = list(linear_attention_problems(MODEL, LinearAttentionConfig(**changes), "model.mixers.a", 2))
    assert [problem.key for problem in problems] == [f"model.mixers.a.{key}"]
    assert message in problems[0].message


def test_the_systems_are_without_problems():
    assert [p for c in SYSTEMS.values() for p in linear_attention_problems(MODEL, replace(c), "m", 1)] == []
