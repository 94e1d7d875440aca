"""Streams of heads in one pass against the same by torch's operations, which other tests compare with loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hopescale.ops.cpp import build
from hopescale.ops.documents import Documents
from hopescale.ops.head_streams import head_streams

BATCH, HEADS, SLICES, DIM = 2, 3, 3, 16

pytestmark = pytest.mark.skipif(build.problem() is not None, reason="no C++ compiler could build the library")


def run(tokens: int, taps: int, unit: tuple[bool, ...], backend: str, first: Tensor | None = None) -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    projected = torch.randn(tokens, BATCH, HEADS, SLICES + 1, DIM, generator=g, requires_grad=True)
    leaves, weight, tail = [projected], None, None
    if taps:
        weight = torch.randn(HEADS * SLICES * DIM, taps, generator=g, requires_grad=True)
        tail = torch.randn(BATCH, taps - 1, HEADS * SLICES * DIM, generator=g, requires_grad=True)
        leaves += [weight, tail]
    inputs = projected[..., :SLICES, :]  # the slice of an output gate stays behind
    tail = None if tail is None else tail.transpose(0, 1)
    streams, after = head_streams(inputs, weight, tail, unit, first=first, backend=backend)
    loss = (streams * torch.randn(streams.shape, generator=g)).sum()
    if after is not None:
        loss = loss + (after * torch.randn(after.shape, generator=g)).sum()
    return [streams, *([] if after is None else [after]), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("unit", [(True, True, True), (True, False, True)])
@pytest.mark.parametrize("taps", [0, 1, 4])
@pytest.mark.parametrize("tokens", [1, 2, 3, 39])
def test_one_pass_equals_torchs_operations(tokens: int, taps: int, unit: tuple[bool, ...]):
    for actual, expected in zip(run(tokens, taps, unit, "cpp"), run(tokens, taps, unit, "torch"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


DOCUMENTS = torch.tensor([[0, 0, 0, 1, 2, 3, 3], [0, 1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("taps", [0, 1, 2, 4, 9])
def test_one_pass_reads_no_earlier_document_either(taps: int):
    first = Documents.of(DOCUMENTS).first
    unit = (True, False, True)
    pairs = zip(run(7, taps, unit, "cpp", first), run(7, taps, unit, "torch", first), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_float32_whatever_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        x = torch.ones(5, BATCH, HEADS, SLICES, DIM, dtype=torch.float32, requires_grad=True)
        head_streams(x, None, None, (False,) * SLICES, backend="cpp")[0].sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(x.grad, torch.ones_like(x))


def test_a_sequence_cut_in_two_gives_the_same_bits():
    g = torch.Generator().manual_seed(2)
    x = torch.randn(11, BATCH, HEADS, SLICES, DIM, generator=g)
    weight = torch.randn(HEADS * SLICES * DIM, 4, generator=g)
    tail = torch.zeros(3, BATCH, HEADS * SLICES * DIM)
    whole, last = head_streams(x, weight, tail, (True,) * SLICES, backend="cpp")
    parts = []
    for part in x.split([1, 3, 7]):
        streams, tail = head_streams(part, weight, tail, (True,) * SLICES, backend="cpp")
        parts.append(streams)
    assert torch.equal(torch.cat(parts, dim=3), whole)
    assert torch.equal(tail, last)
