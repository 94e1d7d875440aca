"""Linear maps, norms and gated MLPs without gradients in C++ against the equations, for few vectors and many."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hopescale.ops import vectors
from hopescale.ops.cpp import build
from hopescale.ops.gated_mlps import GatedMlp, can_run_mlps, gated_mlps
from hopescale.ops.norm import rms_norm
from hopescale.ops.vectors import linear

COUNTS = (1, 3, 4, 5, 128, 130, 300)
"""Few vectors, too many of these and too few for packed weights, and many."""

pytestmark = pytest.mark.skipif(build.problem() is not None, reason="no C++ compiler could build the library")


def make(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_mlps(width: int) -> list[GatedMlp]:
    return [
        GatedMlp(
            make(width, seed=hidden),
            make(hidden, width, seed=hidden + 1) / width**0.5,
            make(hidden, width, seed=hidden + 2) / width**0.5,
            make(width, hidden, seed=hidden + 3) / hidden**0.5,
        )
        for hidden in (48, 16)
    ]


def naive_mlps(x: Tensor, added: Tensor | None, mlps: list[GatedMlp], eps: float) -> Tensor:
    y = x.double() if added is None else x.double() + added.double()
    for norm, gate, up, down in (tuple(weight.double() for weight in mlp) for mlp in mlps):
        normed = y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * norm
        y = y + (F.silu(normed @ gate.T) * (normed @ up.T)) @ down.T
    return y


def assert_close(actual: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual.double() / scale, expected.double() / scale, rtol=0, atol=2e-6)


@pytest.fixture
def torch_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a product that goes to torch fail."""
    monkeypatch.setattr(vectors.F, "linear", lambda *_: pytest.fail("torch computes the product"))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("columns", "rows"), [(16, 16), (48, 80), (352, 192), (32, 33)])
@torch.no_grad()
def test_products(count: int, columns: int, rows: int):
    x, weight = make(count, 1, columns), make(rows, columns, seed=1)
    assert_close(linear(x, weight), x.double() @ weight.double().T)
    strided = make(1, columns, count).permute(2, 0, 1)
    assert_close(linear(strided, weight), strided.double() @ weight.double().T)


@pytest.mark.usefixtures("torch_refuses")
@pytest.mark.parametrize("count", [1, 4, 128])
@torch.no_grad()
def test_few_vectors_and_many_are_mapped_in_cpp(count: int):
    linear(make(count, 32), make(48, 32))


@pytest.mark.usefixtures("torch_refuses")
@pytest.mark.parametrize(
    "case", ["some vectors", "odd width", "another type", "strided weight", "threads", "gradients"]
)
def test_torch_has_the_rest(case: str, monkeypatch: pytest.MonkeyPatch):
    x, weight = make(20 if case == "some vectors" else 1, 32), make(48, 32)
    if case == "odd width":
        x, weight = make(1, 24), make(48, 24)
    if case == "another type":
        x, weight = x.double(), weight.double()
    if case == "strided weight":
        weight = make(32, 48).T
    if case == "threads":
        x = make(128, 32)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with torch.set_grad_enabled(case == "gradients"), pytest.raises(pytest.fail.Exception, match="torch computes"):
        linear(x, weight)


@pytest.mark.parametrize("shape", [(1, 1, 16), (5, 48), (130, 352), (3, 24)])
def test_norms(shape: tuple[int, ...]):
    x, weight = make(*shape), make(shape[-1], seed=1)
    expected = rms_norm(x.double(), weight.double(), 1e-5)
    with torch.no_grad():
        assert_close(rms_norm(x, weight, 1e-5), expected)
        assert_close(rms_norm(x.mT.contiguous().mT, weight, 1e-5), expected)


@pytest.mark.parametrize("count", [1, 3, 128, 130, 300])
@pytest.mark.parametrize("has_added", [True, False])
@torch.no_grad()
def test_gated_mlps(count: int, has_added: bool):
    mlps, x = make_mlps(32), make(count, 1, 32)
    added = make(count, 1, 32, seed=1) if has_added else None
    before = x.clone()
    assert can_run_mlps(x, mlps)
    assert_close(gated_mlps(x, added, mlps, 1e-5), naive_mlps(x, added, mlps, 1e-5))
    assert torch.equal(x, before)


@pytest.mark.parametrize(("tokens", "batch"), [(64, 2), (2, 2), (48, 5), (1, 4)])
@torch.no_grad()
def test_vectors_lie_in_any_order(tokens: int, batch: int):
    """The stream `[T, B, N]` begins as the transpose of the embedding's output."""
    mlps, x, added = make_mlps(32), *(make(batch, tokens, 32, seed=seed).transpose(0, 1) for seed in (0, 1))
    assert can_run_mlps(x, mlps) == (tokens * batch <= 4 or tokens * batch >= 128)
    assert_close(gated_mlps(x, added, mlps, 1e-5), naive_mlps(x, added, mlps, 1e-5))
    assert_close(gated_mlps(x, added.contiguous(), mlps, 1e-5), naive_mlps(x, added, mlps, 1e-5))
    weight = make(32, seed=2)
    assert_close(rms_norm(x, weight, 1e-5), rms_norm(x.double(), weight.double(), 1e-5))
    assert_close(linear(x, mlps[0].gate), x.double() @ mlps[0].gate.double().T)


@torch.no_grad()
def test_a_weight_of_another_type_or_width_is_for_torch():
    x = make(1, 32)
    assert_close(rms_norm(x, make(32).double(), 1e-5), rms_norm(x.double(), make(32).double(), 1e-5))
    with pytest.raises(RuntimeError, match="shapes|size"):
        linear(x, make(48, 16))


@torch.no_grad()
def test_threads_share_vectors_and_change_no_bit(monkeypatch: pytest.MonkeyPatch):
    mlps, x = make_mlps(32), make(300, 32)
    expected = gated_mlps(x, x, mlps, 1e-5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert can_run_mlps(x, mlps) and not can_run_mlps(x[:200], mlps)
    assert torch.equal(gated_mlps(x, x, mlps, 1e-5), expected)


@pytest.mark.usefixtures("torch_refuses")
@pytest.mark.parametrize(("count", "rows"), [(1, 60_000), (4, 50_007)])
@torch.no_grad()
def test_threads_share_the_rows_of_large_weights_and_change_no_bit(
    count: int, rows: int, monkeypatch: pytest.MonkeyPatch
):
    """A thread has 2 MiB of a weight; the last one has what is left over."""
    x, weight = make(count, 32), make(rows, 32, seed=1)
    mlps, norm = [GatedMlp(make(32), weight[:48_000], -weight[:48_000], make(32, 48_000))], make(32, seed=2)
    run = (lambda: linear(x, weight)), (lambda: gated_mlps(x, x, mlps, 1e-5)), (lambda: rms_norm(x, norm, 1e-5))
    expected = [each() for each in run]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert can_run_mlps(x, mlps)
    for each, result in zip(run, expected, strict=True):
        assert torch.equal(each(), result)


@torch.no_grad()
def test_mlps_of_odd_widths_are_for_torch():
    odd = make_mlps(32)[0]
    odd = odd._replace(gate=make(24, 32), up=make(24, 32), down=make(32, 24))
    assert not can_run_mlps(make(1, 32), [odd])
    assert not can_run_mlps(make(1, 32).double(), make_mlps(32))
    assert not can_run_mlps(make(20, 32), make_mlps(32))
