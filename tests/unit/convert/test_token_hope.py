"""The step of an export for a single token without gradients: equal to the step by chunks, and in few operations."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hopescale.config.schema import FarMemoryConfig, SelfModifyingConfig
from hopescale.convert.hf_model.columns_hope import Columns, RowPosition, State
from hopescale.convert.hf_model.memory_hope import HopeSelfModifying
from tests.unit.convert.test_modeling_hope import make_pair

MODEL = SimpleNamespace(d_model=12, num_heads=3, norm_eps=1e-6)
DIM, TOKENS, STARTS, STEPS = 4, 17, (6, 8), 9
SETTINGS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "read after the write": {"read": "inclusive"},
    "read at the boundary": {"read": "boundary"},
    "gradient descent": {"inner_rule": "gd"},
    "gradient descent, no momentum": {"inner_rule": "gd", "momentum": False},
    "no momentum, no retention": {"momentum": False, "retention": False, "adaptive": ("k", "v", "eta")},
    "no retention": {"retention": False, "adaptive": ("k", "v", "eta")},
    "whole writes, high rates": {"momentum_write": "whole", "eta_max": 1.5},
    "inner products": {"objective": "dot"},
    "capped errors": {"error_cap": 0.3},
    "no memory but one": {"adaptive": ()},
    "values as targets": {"adaptive": (), "targets": "value"},
    "values as targets, capped": {"adaptive": (), "targets": "value", "error_cap": 0.3, "read": "inclusive"},
    "values as targets, inner products": {"adaptive": (), "targets": "value", "objective": "dot"},
    "keys": {"adaptive": ("k",)},
    "values": {"adaptive": ("v",)},
    "gates": {"adaptive": ("eta", "alpha")},
    "one gate": {"adaptive": ("alpha",)},
    "queries": {"adaptive": ("eta",), "query": "memory"},
    "keys, queries and a gate": {"adaptive": ("k", "alpha"), "query": "memory"},
    "values and queries": {"adaptive": ("v",), "query": "memory"},
    "all streams": {"query": "memory", "gate": True},
    "no convolution": {"conv_width": None},
    "two banks": {"projection_chunk_size": 8},
    "two banks that start anew": {"projection_chunk_size": 8, "reset_every": 8},
    "far": {"reset_every": 8, "far": FarMemoryConfig(12, 0.1)},
    "far, values as targets": {"adaptive": (), "targets": "value", "far": FarMemoryConfig(8, 0.1), "retention": False},
}
MLP_SETTINGS = {"plain writes": {"normalize_writes": False}, "narrow": {"memory_dim": 3}, "wide": {"memory_dim": 9}}
CASES = [("linear", name) for name in SETTINGS] + [("mlp", name) for name in SETTINGS | MLP_SETTINGS]
MOST_CALLS = {"hope": 200, "two banks, linear": 135}
"""Calls of operations by a block with two levels; a chunk of one token would take 761 and 400."""


def make_mixer(memory: str, name: str) -> HopeSelfModifying:
    config = replace(SelfModifyingConfig(memory=memory, chunk_size=4), **(SETTINGS | MLP_SETTINGS)[name])
    parts = {"far": None if config.far is None else SimpleNamespace(**vars(config.far))}
    mixer = HopeSelfModifying(MODEL, SimpleNamespace(**vars(config) | parts), DIM)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.4 * torch.randn(parameter.shape, generator=generator)
    return mixer


def columns_of(position: list[int], tokens: int) -> Columns:
    rows = len(position)
    groups = [(torch.arange(rows), slice(0, tokens))]
    return Columns(torch.ones(rows, tokens, dtype=torch.bool), RowPosition(position), groups)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5 * max(1.0, float(wanted.detach().abs().max())))


@pytest.mark.parametrize(("memory", "name"), CASES)
@torch.no_grad()
def test_tokens_equal_chunks(memory: str, name: str):
    """Of two rows at different places of their chunks, of which each was begun by itself."""
    mixer = make_mixer(memory, name)
    x = torch.randn(len(STARTS), TOKENS, MODEL.d_model, generator=torch.Generator().manual_seed(1))
    begun, wanted, last = [], [], []
    for row, start in enumerate(STARTS):
        begun.append(mixer(x[row : row + 1, :start], {}, columns_of([0], start))[1])
        y, after = mixer(x[row : row + 1, : start + STEPS], {}, columns_of([0], start + STEPS))
        wanted.append(y[:, start:])
        last.append(after)
    state: State = {part: torch.cat([one[part] for one in begun]) for part in begun[0]}
    outputs = []
    for step in range(STEPS):
        tokens = torch.stack([x[row, start + step] for row, start in enumerate(STARTS)])[:, None]
        before = {part: tensor.clone() for part, tensor in state.items()}
        y, after = mixer(tokens, state, columns_of([start + step for start in STARTS], 1))
        assert all(state[part].equal(tensor) for part, tensor in before.items())
        outputs.append(y)
        state = after
    close(torch.cat(outputs, dim=1), torch.cat(wanted))
    for part, tensor in state.items():
        close(tensor, torch.cat([one[part] for one in last]))


def test_a_first_token_and_a_token_with_gradients_equal_a_whole_text():
    """With gradients a token is a chunk of one."""
    mixer = make_mixer("mlp", "as it is")
    x = torch.randn(2, 3, MODEL.d_model, generator=torch.Generator().manual_seed(1), requires_grad=True)
    wanted, _ = mixer(x, {}, columns_of([0, 0], 3))
    wanted.square().sum().backward()
    expected, x.grad = x.grad, None
    found, state, lean = [], {}, []
    for step in range(3):
        with torch.no_grad():
            lean.append(mixer(x[:, step : step + 1], state, columns_of([step] * 2, 1))[0])
        y, state = mixer(x[:, step : step + 1], state, columns_of([step] * 2, 1))
        found.append(y)
    close(torch.cat(lean, dim=1), wanted)
    close(torch.cat(found, dim=1), wanted)
    torch.cat(found, dim=1).square().sum().backward()
    close(x.grad, expected)


class Calls(TorchDispatchMode):
    """Counts the calls of operations by name."""

    def __init__(self):
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count a call and make it."""
        self.counts[str(func)] = self.counts.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", MOST_CALLS)
@torch.no_grad()
def test_a_block_takes_few_operations_for_a_token(variant: str):
    """Within a chunk; nothing of it waits for the device."""
    _, model = make_pair(variant)
    tokens = torch.arange(14)[None]
    cache = model(tokens[:, :13]).past_key_values
    x = model.embedding(tokens[:, 13:])
    columns, block = model._columns(x, None, cache, None), model.blocks["0"]
    with Calls() as calls:
        block(x, cache.layers[0], columns)
    assert sum(calls.counts.values()) <= MOST_CALLS[variant]
    assert "aten._local_scalar_dense.default" not in calls.counts


@torch.no_grad()
def test_a_state_can_be_continued_more_than_once():
    _, model = make_pair("all kinds")
    tokens = torch.arange(20).view(2, 10)
    read = model(tokens[:, :8]).past_key_values
    first, again = (model(tokens[:, 8:9], past_key_values=read) for _ in range(2))
    assert first.logits.equal(again.logits)
    rest = model(tokens[:, 9:], past_key_values=first.past_key_values)
    close(rest.logits, model(tokens).logits[:, 9:])


@pytest.mark.parametrize("name", ["hope", "MAC", "all kinds"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_an_export_that_was_cast_generates(name: str, kind: torch.dtype):
    model = make_pair(name)[1].to(kind)
    prompt = torch.arange(1, 8)[None]
    assert model.generate(prompt, max_new_tokens=3, do_sample=False).shape == (1, 10)


def test_an_export_of_mac_goes_on_under_autocast():
    model = make_pair("MAC")[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.generate(torch.arange(1, 8)[None], max_new_tokens=3, do_sample=False).shape == (1, 10)
