"""The dual form of test-time training: a mini-batch of tokens by matrix products (arXiv 2407.04620, section 2.5)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hopescale.ops.device import to_device
from hopescale.ops.documents import Documents
from hopescale.ops.ttt.types import TttMemory, TttState, TttStreams, TttWeights


def ttt(
    streams: TttStreams,
    state: TttState,
    memory: TttMemory,
    *,
    position: int = 0,
    documents: Documents | None = None,
    before: TttState | None = None,
) -> tuple[Tensor, TttState]:
    """Let memories learn from tokens, a mini-batch at a time, and answer each token after its own step.

    A memory answers `x + LN(f(x; W))` and learns by `1/2 |k + LN(f(k; W)) - v|^2`, its gradients taken at the weights
    with which the mini-batch began. Token `i` of a mini-batch is answered by `W_i = W_0 - scale_i sum_{j <= i} rate_j
    g_j`, and the last token's weights begin the next one. Equal to `ttt_naive` up to rounding.

    Args:
        streams: Tokens, float32 (float64 in tests).
        state: Weights and sums before the first token. With documents: those that each begins with, a batch of one.
        memory: Parts of the inner loss that stay.
        position: Tokens that came before; mini-batches begin at multiples of their size.
        documents: Documents in the sequences, each with weights and mini-batches of its own. The state returned is that
            after the last one of each sequence. None takes a sequence for one document.
        before: State of each sequence after an earlier piece, whose last document may go on.

    Returns:
        Answers `[B, H, T, D]` and the state after the last token.

    Raises:
        ValueError: If documents are given and tokens came before.
    """
    if documents is not None:
        if position:
            raise ValueError(f"documents are given, but {position} tokens came before, whose documents are unknown")
        return _by_documents(streams, state, memory, documents, before)
    tokens, size, outputs = streams.q.shape[2], len(memory.scale), []
    place = position % size
    lengths = [min(tokens, size - place)] if place else []
    lengths += [min(size, tokens - begin) for begin in range(sum(lengths), tokens, size)]
    for part in streams.split(lengths):
        y, state = _mini_batch(part, state, memory, place, goes_on=place > 0)
        outputs.append(y)
        place += y.shape[2]
        if place == size:
            state, place = _stepped(state, memory), 0
    return torch.cat(outputs, dim=2) if outputs else streams.q, state


def _mini_batch(
    streams: TttStreams, state: TttState, memory: TttMemory, place: int, *, goes_on: bool
) -> tuple[Tensor, TttState]:
    """Run tokens of one mini-batch, from its token `place` on; only the sums of the state change.

    `goes_on` tells whether they are looked at.
    """
    q, k, v, rate = streams
    scale = memory.scale[place : place + q.shape[2], None]
    weights, learned = state.weights, _inputs_and_gradients(state.weights, k, v - k, memory)
    z, sums = q, []
    for number, ((w, b), earlier, (x, g)) in enumerate(
        zip(weights.layers(), state.sums.layers(), learned, strict=True)
    ):
        z = z if number == 0 else F.gelu(z, approximate="tanh")
        # Each earlier token's step moves the answer by its input's product with this one's, and by 1 for the bias.
        moved = ((z @ x.mT + 1) * rate[..., None, :]).tril() @ g
        stepping = rate[..., None] * g
        steps = x.mT @ stepping, stepping.sum(-2, keepdim=True)
        if goes_on:
            moved = moved + (z @ earlier[0] + earlier[1])
            steps = (step + before for step, before in zip(steps, earlier, strict=True))
        z = z @ w + b - scale * moved
        sums += steps
    normed, _ = _normed(z, memory.eps)
    sums = TttWeights(*sums, *[None] * (4 - len(sums)))
    return q + memory.gamma * normed + memory.beta, TttState(weights, sums)


def _inputs_and_gradients(
    weights: TttWeights, k: Tensor, target: Tensor, memory: TttMemory
) -> list[tuple[Tensor, Tensor]]:
    """Return the input of each layer for the keys, and the inner loss's gradient with respect to its output."""
    z = k @ weights.w1 + weights.b1
    if weights.w2 is None:
        return [(k, _loss_gradient(z, target, memory))]
    hidden = F.gelu(z, approximate="tanh")
    gradient = _loss_gradient(hidden @ weights.w2 + weights.b2, target, memory)
    return [(k, gradient @ weights.w2.mT * _gelu_slope(z)), (hidden, gradient)]


def _normed(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return `z` with mean 0 and variance 1, and the factor that made it so."""
    centred = z - z.mean(-1, keepdim=True)
    factor = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * factor, factor


def _loss_gradient(z: Tensor, target: Tensor, memory: TttMemory) -> Tensor:
    """Return the gradient of `1/2 |LN(z) - target|^2` with respect to `z`."""
    normed, factor = _normed(z, memory.eps)
    g = (memory.gamma * normed + memory.beta - target) * memory.gamma
    return factor * (g - g.mean(-1, keepdim=True) - normed * (g * normed).mean(-1, keepdim=True))


def _gelu_slope(z: Tensor) -> Tensor:
    """Return the derivative of GELU in its tanh form."""
    root = math.sqrt(2 / math.pi)
    tanh = torch.tanh(root * (z + 0.044715 * z**3))
    return 0.5 * (1 + tanh) + 0.5 * z * (1 - tanh.square()) * root * (1 + 3 * 0.044715 * z.square())


def _stepped(state: TttState, memory: TttMemory) -> TttState:
    """Take the step of a whole mini-batch."""
    weights = state.weights.map(lambda w, g: w - memory.scale[-1] * g, state.sums)
    return TttState(weights, state.sums.map(torch.zeros_like))


def _by_documents(
    streams: TttStreams, state: TttState, memory: TttMemory, documents: Documents, before: TttState | None
) -> tuple[Tensor, TttState]:
    """Run all documents along together, a mini-batch at a time; one that has ended drops out.

    Padding behind a document's last token has a rate of 0, so that it teaches nothing; so has padding at the places of
    a mini-batch that an earlier piece has run.
    """
    tokens, device, size = documents.bounds[-1], streams.q.device, len(memory.scale)
    run = [earlier % size for earlier in documents.before]
    lengths = [place + length for place, length in zip(run, documents.lengths, strict=True)]
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    places = _places(documents, run, order, size)
    index = torch.cat([at.flatten() for at in places])
    origin = torch.empty(tokens + 1, dtype=torch.int64)
    origin[index] = torch.arange(len(index))
    parts = _gathered(streams, to_device(index, device), [at.shape for at in places])
    state = _begun(state, documents, order, before)
    outputs, ended = [], []
    for at, part, alive in zip(places, parts, [*map(len, places[1:]), 0], strict=True):
        y, state = _mini_batch(part, state, memory, 0, goes_on=before is not None and not outputs)
        outputs.append(y.transpose(1, 2).flatten(0, 1))
        going, gone = state.split([alive, len(at) - alive])
        state = _stepped(going, memory)
        # Of the documents that end here, those that end with the mini-batch take its step.
        whole = to_device((at[alive:, -1] < tokens)[:, None, None, None], device)
        pairs = zip(_stepped(gone, memory), gone, strict=True)
        ended.append(TttState(*(new.map(lambda a, b, m=whole: torch.where(m, a, b), old) for new, old in pairs)))
    # The shortest document, the last one in order, ended first.
    last = to_device(torch.tensor([order.index(number) for number in documents.last]), device)
    state = TttState(*(TttWeights.cat(each).map(lambda x: x[last]) for each in zip(*reversed(ended), strict=True)))
    y = torch.cat(outputs).index_select(0, to_device(origin[:tokens], device))
    return y.unflatten(0, documents.first.shape).transpose(1, 2), state


def _begun(fresh: TttState, documents: Documents, order: list[int], before: TttState | None) -> TttState:
    """Return the states that documents begin with, in some order; `before` those that go on from an earlier piece."""
    if before is None:
        return TttState(*(part.map(lambda x: x.expand(len(order), *x.shape[1:])) for part in fresh))
    index = to_device(torch.tensor(documents.states(order)), fresh.weights.w1.device)
    pairs = zip(fresh, before, strict=True)
    return TttState(*(TttWeights.cat(pair).map(lambda x: x.index_select(0, index)) for pair in pairs))


def _places(documents: Documents, run: list[int], order: list[int], size: int) -> list[Tensor]:
    """Return where each mini-batch finds its tokens among all: `[N, C]` of the `N` documents that are not at their end.

    Documents are in an order from long to short, with the places that were `run` before. Padding is at the place behind
    all tokens.
    """
    bounds, tokens, places = torch.tensor(documents.bounds), documents.bounds[-1], []
    begins, ends = (bounds[torch.tensor(order) + after] for after in (0, 1))
    starts = begins - torch.tensor(run)[order]
    for start in range(0, int((ends - starts)[0]), size):
        going = int((ends - starts > start).sum())
        at = starts[:going, None] + start + torch.arange(size)
        places.append(torch.where((begins[:going, None] <= at) & (at < ends[:going, None]), at, tokens))
    return places


def _gathered(streams: TttStreams, index: Tensor, shapes: list[torch.Size]) -> list[TttStreams]:
    """Return the tokens at `index` of all sequences in a row, in parts of some shapes `[N, C]`; padding is zero."""
    found = []
    for x in streams:
        rows = x.transpose(1, 2).flatten(0, 1)  # [B T, H, ...]
        rows = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])]).index_select(0, index)
        parts = rows.split([shape.numel() for shape in shapes])
        found.append([part.unflatten(0, shape).transpose(1, 2) for part, shape in zip(parts, shapes, strict=True)])
    return [TttStreams(*parts) for parts in zip(*found, strict=True)]
