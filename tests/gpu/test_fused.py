"""The fused kernels around the memories against the same in torch's operations: on a GPU, else interpreted.

Needs `TRITON_INTERPRET=1` before Triton is imported; `tests/unit/ops/test_fused.py` sees to that.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hopescale.ops.documents import Documents
from hopescale.ops.head_streams import head_streams
from hopescale.ops.norm import rms_norm

pytest.importorskip("triton", reason="triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
pytestmark = pytest.mark.smoke
DEVICE = "cpu" if INTERPRETED else "cuda"
BATCH, HEADS, DIM, EPS = 2, 2, 16, 1e-5


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def compare(fused: Callable, plain: Callable, *tensors: Tensor, tolerance: float = 1e-5) -> None:
    """Compare results and all gradients with those of float64; another run gives the same bits."""
    results = []
    for function, kind in ((fused, None), (fused, None), (plain, torch.float64)):
        given = [tensor.detach().to(kind or tensor.dtype).requires_grad_() for tensor in tensors]
        outputs = function(*given)
        weights = [torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).sin() for out in outputs]
        loss = sum((out.double() * weight).sum() for out, weight in zip(outputs, weights, strict=True))
        gradients = torch.autograd.grad(loss, given)
        results.append([*outputs, *gradients])
    for found, again, expected in zip(*results, strict=True):
        assert torch.equal(found, again)
        scale = 1 + expected.abs().max().item()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_norm_of_a_sum(kind: torch.dtype):
    from hopescale.ops.fused.norm import add_rms_norm

    x, added, weight = randn(17, 2, 24, seed=0).to(kind), randn(17, 2, 24, seed=1).to(kind), 1 + randn(24, seed=2)
    tolerance = 1e-5 if kind == torch.float32 else 1e-2
    sums = lambda x, added, weight: (x + added, rms_norm(x + added, weight, EPS))  # noqa: E731
    compare(lambda *given: add_rms_norm(*given, EPS), sums, x, added, weight, tolerance=tolerance)
    alone = lambda x, weight: (x, rms_norm(x, weight, EPS))  # noqa: E731
    compare(lambda x, weight: add_rms_norm(x, None, weight, EPS), alone, x, weight, tolerance=tolerance)
    # The gradient of the sum may be missing, and that of the norm.
    compare(lambda *given: [add_rms_norm(*given, EPS)[1]], lambda *given: [sums(*given)[1]], x, added, weight,
            tolerance=tolerance)  # fmt: skip
    compare(lambda x: [add_rms_norm(x, None, weight, EPS)[0]], lambda x: [x], x, tolerance=tolerance)


def test_swiglu():
    from hopescale.ops.fused.swiglu import swiglu

    def plain(x: Tensor, gate: Tensor, up: Tensor) -> list[Tensor]:
        return [F.silu(x @ gate.T) * (x @ up.T)]

    compare(lambda *given: [swiglu(*given)], plain, randn(3, 5, 7, seed=0), randn(71, 7, seed=1), randn(71, 7, seed=2))


@pytest.mark.parametrize("tokens", [1, 70])
def test_answers_are_scaled_and_gated(tokens: int, monkeypatch: pytest.MonkeyPatch):
    from hopescale.ops.fused import answers

    monkeypatch.setattr(answers, "TILES", 2)
    gated_answers = answers.gated_answers

    y, mixed = randn(BATCH, HEADS, tokens, DIM, seed=0), randn(tokens, BATCH, HEADS, 2, DIM, seed=1)
    weight = 1 + randn(HEADS, DIM, seed=2)

    def plain(y: Tensor, mixed: Tensor, weight: Tensor) -> list[Tensor]:
        return [rms_norm(y.permute(2, 0, 1, 3), weight, EPS) * F.silu(mixed[..., 1, :])]

    compare(lambda y, mixed, w: [gated_answers(y, mixed[..., 1, :], w, EPS, torch.float32)], plain, y, mixed, weight)
    ungated = lambda y, weight: [rms_norm(y.permute(2, 0, 1, 3), weight, EPS)]  # noqa: E731
    compare(lambda y, w: [gated_answers(y, None, w, EPS, torch.float32)], ungated, y, weight)


@pytest.mark.parametrize(
    ("tokens", "heads", "width", "unit", "slices", "cut", "carried"),
    [
        (1, 2, 4, (True, True, True), 4, False, True),
        (3, 1, 4, (True, False, True), 3, False, False),
        (2, 1, 4, (True, False, True), 4, False, False),
        (70, 1, 3, (True, True, True), 4, True, False),
        (70, 1, 0, (True, True, True), 3, False, False),
    ],
)
def test_streams_and_gates(
    tokens: int, heads: int, width: int, unit: tuple[bool, ...], slices: int, cut: bool, carried: bool
):
    from hopescale.ops.fused.streams import head_streams_and_gates

    x = randn(tokens, BATCH, heads, slices, DIM, seed=0)
    # The second gate has no weights.
    weights, biases = [randn(heads, DIM, seed=n) for n in (1, 5)], [randn(heads, seed=n) for n in (2, 6, 7)]
    channels = heads * 3 * DIM
    filters = [randn(channels, width, seed=3)] if width else []
    tail = randn(width - 1, BATCH, channels, seed=4) if carried else None
    first = None
    if cut:
        ids = (torch.arange(tokens) // torch.tensor([[50], [23]])).int().to(DEVICE)
        first = Documents.of(ids).first

    def fused(x: Tensor, w: Tensor, w_last: Tensor, *rest: Tensor) -> list[Tensor]:
        own, gates = rest[3] if width else None, list(zip((w, None, w_last), rest[:3], strict=True))
        streams, logits, left, after = head_streams_and_gates(x, own, tail, unit, gates, first=first)
        return [part for part in (*streams, *logits, left, after) if part is not None and part.numel()]

    def plain(x: Tensor, w: Tensor, w_last: Tensor, *rest: Tensor) -> list[Tensor]:
        own, before = rest[3] if width else None, None
        if width:
            before = x.new_zeros(width - 1, BATCH, channels) if tail is None else tail.double()
        streams, after = head_streams(x[..., :3, :], own, before, unit, first=first)
        pairs = zip((w, torch.zeros_like(w), w_last), rest[:3], strict=True)
        logits = [(streams[0] * weight[:, None]).sum(-1) + bias[:, None] for weight, bias in pairs]
        return [part for part in (*streams, *logits, x[..., 3:, :], after) if part is not None and part.numel()]

    compare(fused, plain, x, *weights, *biases, *filters, tolerance=3e-5)


def test_a_mixer_and_levels_are_the_same_with_kernels():
    """The memories themselves are left out: their kernels have tests of their own."""
    from dataclasses import replace

    from hopescale.models.block import Block
    from hopescale.models.init import initialize
    from hopescale.parallel.mesh import Mesh
    from tests.support.models import BASE

    found = []
    for backend in ("triton", "torch"):
        block = Block(replace(BASE, num_heads=2), 0, Mesh.alone(), backend=backend).to(DEVICE)
        initialize(block, 0, Mesh.alone())
        mixer, x = block.mixer, randn(21, BATCH, 32, seed=0).requires_grad_()
        mixed = mixer.in_proj(block.norm(x)[1]).unflatten(-1, (mixer.heads, -1, mixer.head_dim))
        streams, gate, tail = mixer._project(mixed, None, None, 0)
        answer = streams.k * streams.eta[..., None] + streams.v * streams.alpha[..., None] + streams.q
        y = mixer.out_proj(mixer._out(answer * streams.mu[..., None], gate, x.dtype).flatten(2))
        out = block.cms(x, y)
        named = {name: p for name, p in block.named_parameters() if "banks" not in name}
        gradients = torch.autograd.grad(out.sin().sum() + tail.sum(), [x, *named.values()])
        found.append([out, *gradients])
    for kernels, plain in zip(*found, strict=True):
        torch.testing.assert_close(kernels, plain, rtol=1e-4, atol=1e-4)
