"""The dual form of test-time training against its loop, which takes inner gradients by autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hopescale.ops.documents import Documents
from hopescale.ops.ttt import TttMemory, TttState, TttStreams, TttWeights, ttt, ttt_naive

BATCH, HEADS, DIM, HIDDEN, SIZE = 2, 2, 5, 7, 16
LENGTHS = (1, 3, 16, 17, 63, 130)


def make_inputs(tokens: int, hidden: int | None, batch: int = BATCH) -> tuple[TttStreams, TttState, TttMemory]:
    g = torch.Generator().manual_seed(tokens)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).requires_grad_()

    width = hidden or DIM
    second = (None, None) if hidden is None else (rand(batch, HEADS, width, DIM), rand(batch, HEADS, 1, DIM))
    weights = TttWeights(rand(batch, HEADS, DIM, width), rand(batch, HEADS, 1, width), *second)
    streams = TttStreams(*(rand(BATCH, HEADS, tokens, DIM) for _ in range(3)), rand(BATCH, HEADS, tokens))
    memory = TttMemory(rand(SIZE), rand(HEADS, 1, DIM), rand(HEADS, 1, DIM), 1e-6)
    return streams, TttState(weights, weights.map(torch.zeros_like)), memory


def tensors(*parts: object) -> list[Tensor]:
    """Tensors of nested tuples, in order."""
    found = []
    for part in parts:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, tuple):
            found += tensors(*part)
    return found


def with_gradients(outputs: tuple, inputs: tuple) -> list[Tensor]:
    g, results = torch.Generator().manual_seed(7), tensors(outputs)
    loss = sum((x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum() for x in results)
    leaves = [x for x in tensors(inputs) if x.requires_grad]
    return results + list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


def assert_all_close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        scale = float(b.detach().abs().max()) + 1e-9
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=1e-8)


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("hidden", [None, HIDDEN], ids=["linear", "mlp"])
def test_the_dual_form_equals_the_token_loop(tokens: int, hidden: int | None):
    inputs = make_inputs(tokens, hidden)
    assert_all_close(with_gradients(ttt(*inputs), inputs), with_gradients(ttt_naive(*inputs), inputs))


@pytest.mark.parametrize("hidden", [None, HIDDEN], ids=["linear", "mlp"])
@pytest.mark.parametrize("cut", [0, 1, 15, 16, 40])
def test_a_split_sequence_equals_one_pass(hidden: int | None, cut: int):
    streams, state, memory = make_inputs(41, hidden)
    whole = ttt(streams, state, memory)
    parts = streams.split([cut, 41 - cut])
    first, middle = ttt(parts[0], state, memory)
    second, last = ttt(parts[1], middle, memory, position=cut)
    assert_all_close([torch.cat([first, second], 2), *tensors(last)], tensors(whole))


@pytest.mark.parametrize("hidden", [None, HIDDEN], ids=["linear", "mlp"])
def test_packed_documents_equal_documents_apart(hidden: int | None):
    lengths = [[1, 16, 17, 1, 5], [32, 3, 5]]
    streams, state, memory = make_inputs(40, hidden, batch=1)
    inputs = (streams, state, memory)
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    found = ttt(*inputs, documents=Documents.of(ids))
    rows, states = [], []
    for row, own in enumerate(lengths):
        parts, begin = [], 0
        for length in own:
            part = TttStreams(*(x[row : row + 1, :, begin : begin + length] for x in streams))
            y, last = ttt_naive(part, state, memory)
            parts.append(y)
            begin += length
        rows.append(torch.cat(parts, dim=2))
        states.append(last)
    last = TttState(*(TttWeights.cat(part) for part in zip(*states, strict=True)))
    assert_all_close(with_gradients(found, inputs), with_gradients((torch.cat(rows), last), inputs))


def test_documents_are_refused_after_earlier_tokens():
    inputs = make_inputs(3, None)
    with pytest.raises(ValueError, match="4 tokens came before"):
        ttt(*inputs, position=4, documents=Documents.of(torch.zeros(BATCH, 3, dtype=torch.long)))


def test_an_empty_sequence_returns_the_state():
    streams, state, memory = make_inputs(0, HIDDEN)
    y, last = ttt(streams, state, memory)
    assert y.shape == (BATCH, HEADS, 0, DIM)
    assert all(torch.equal(a, b) for a, b in zip(tensors(last), tensors(state), strict=True))
