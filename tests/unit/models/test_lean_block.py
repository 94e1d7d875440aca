"""A block of Hope for one vector as one operation against the block in float64, and when the block itself runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hopescale.config.schema import CmsConfig, LevelConfig, ModelConfig, SelfModifyingConfig
from hopescale.models.block import Block
from hopescale.models.init import initialize
from hopescale.models.state import GroupedState
from hopescale.ops.cpp import build
from hopescale.parallel.mesh import Mesh
from tests.support.naive_mixer import SWITCHES

WIDTH, CHUNK, TOKENS = 48, 4, 11
OWN = ("hidden width", "far memory")
"""Beginnings of switches that the operation does not know."""
LEVELS = {"fast": LevelConfig(d_ff=32), "slow": LevelConfig(d_ff=80, update_every_steps=2)}

pytestmark = pytest.mark.skipif(build.problem() is not None, reason="no C++ compiler could build the library")


def make_block(mixer: dict[str, object] | None = None, variant: str = "sequential", backend: str = "auto") -> Block:
    hope = replace(SelfModifyingConfig(chunk_size=CHUNK), **(mixer or {}))
    sizes = {"d_model": WIDTH, "num_heads": 2, "head_dim": 16, "num_layers": 1}
    config = ModelConfig(**sizes, mixers={"hope": hope}, cms=CmsConfig(variant=variant, levels=LEVELS))
    block = Block(config, 0, Mesh.alone(), backend=backend)
    initialize(block, 0, Mesh.alone())
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=g)
    return block


def make_stream() -> Tensor:
    return torch.randn(TOKENS, 1, WIDTH, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def one_by_one(block: Block, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    outputs, state = [], None
    for vector in x.split(1):
        y, state = block(vector, state)
        outputs.append(y)
    return torch.cat(outputs), state.named()


def assert_close(actual: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max()) + 1e-9
    torch.testing.assert_close(actual.double() / scale, expected.double() / scale, rtol=0, atol=3e-5)


@pytest.fixture
def block() -> Block:
    return make_block()


@pytest.mark.parametrize("kind", SWITCHES)
def test_single_vectors_equal_a_whole_pass(kind: str):
    lean, exact, x = make_block(SWITCHES[kind]), make_block(SWITCHES[kind], backend="torch").double(), make_stream()
    with torch.no_grad():
        expected, state = exact(x.double())
    y, after = one_by_one(lean, x)
    assert_close(y, expected)
    assert after.keys() == state.named().keys()
    for name, tensor in state.named().items():
        if lean.mixer.spec.is_sequential or "/boundary/" not in name:
            assert_close(after[name], tensor)
    assert (lean.lean.known[1] is None) == kind.startswith(OWN)


@pytest.mark.parametrize("kind", ["independent levels", "odd levels", "torch", "two sequences", "grouped"])
@torch.no_grad()
def test_other_blocks_run_by_themselves(kind: str, block: Block, monkeypatch: pytest.MonkeyPatch):
    x, state = make_stream(), None
    if kind == "independent levels":
        block = make_block(variant="independent")
    if kind == "odd levels":
        monkeypatch.setitem(LEVELS, "slow", LevelConfig(d_ff=24, update_every_steps=2))
        block = make_block()
    if kind == "torch":
        block = make_block(backend="torch")
    if kind == "two sequences":
        x = x.expand(-1, 2, -1)
    _, state = block(x[:3], state)
    if kind == "grouped":
        state = GroupedState((state,), (1,))
    block(x[3:4], state)
    assert block.lean.known[1] is None


@torch.no_grad()
def test_what_a_caller_asks_of_the_block_is_done_by_the_block(block: Block):
    x, seen, probe = make_stream(), [], {}
    _, state = block(x[:3])
    block(x[3:4], state, probe=probe)
    assert probe
    level = {name: weight[None] for name, weight in block.cms.levels["slow"].named_parameters()}
    block(x[3:4], state, levels={"slow": level})
    handle = block.cms.levels["fast"].gate.register_forward_hook(lambda *_: seen.append(True))
    block(x[3:4], state)
    handle.remove()
    assert seen
    with torch.enable_grad():
        assert block(x[3:4], state)[0].requires_grad
    assert block.lean.known[1] is None
    block(x[3:4], state)
    assert block.lean.known[1] is not None


@torch.no_grad()
def test_threads_read_large_weights_and_change_no_bit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(LEVELS, "slow", LevelConfig(d_ff=40_000, update_every_steps=2))  # 7.7 MB each weight
    block, x = make_block({"gate": True}), make_stream()
    one, state = one_by_one(block, x)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    y, after = one_by_one(block, x)
    assert torch.equal(y, one) and all(torch.equal(after[name], tensor) for name, tensor in state.items())
    assert block.lean.known[1] is not None


@pytest.mark.parametrize("how", ["in place", "data", "parameter"])
@torch.no_grad()
def test_changed_weights_are_seen(how: str, block: Block):
    x = make_stream()
    one_by_one(block, x)
    down, smaller = block.cms.levels["slow"].down, block.cms.levels["slow"].down.weight * 0.5
    if how == "in place":
        down.weight.copy_(smaller)
    elif how == "data":
        down.weight.data = smaller
    else:
        down.weight = torch.nn.Parameter(smaller)
    assert_close(one_by_one(block, x)[0], block(x)[0])


@torch.no_grad()
def test_a_given_state_is_not_changed(block: Block):
    x = make_stream()
    for context in (3, 4):  # the next token lies in a chunk, or begins one
        _, state = block(x[:context])
        before = {name: tensor.clone() for name, tensor in state.named().items()}
        first, _ = block(x[context : context + 1], state)
        assert torch.equal(block(x[context : context + 1], state)[0], first)
        assert all(torch.equal(tensor, before[name]) for name, tensor in state.named().items())
