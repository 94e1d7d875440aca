"""Continuous batching over carried states: requests come and go at any token, and share passes wherever they stand."""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hopescale.common.errors import HopescaleError
from hopescale.config.model_shape import projection_chunk_size
from hopescale.config.schema import (
    AttentionConfig,
    LinearAttentionConfig,
    ModelConfig,
    SelfModifyingConfig,
    TitansConfig,
    TttConfig,
)
from hopescale.infer.generate import PREFILL_TOKENS, Reading, prefill
from hopescale.infer.sampling import Sampling, sample
from hopescale.models import Model, ModelState

logger = logging.getLogger(__name__)

Outcome = int | Reading | HopescaleError | None
"""A token, or the end of a request: where the model stands after all that was read, an error, or None."""


class Busy(HopescaleError):
    """More requests wait than the server takes."""


class Failed(HopescaleError):
    """The model could not go on; the log has the reason."""


@dataclass(eq=False)
class Request:
    """A text to read and to go on with.

    Attributes:
        ids: Tokens to read.
        reading: State and prediction of the model before them; None is at the start.
        max_tokens: Most tokens to write; 0 reads alone.
        sampling: Rule that chooses tokens.
        seed: Seed of the choice.
        end: Token that ends the text and is not part of it; None never ends.
    """

    ids: Sequence[int]
    reading: Reading | None
    max_tokens: int
    sampling: Sampling = Sampling()
    seed: int = 0
    end: int | None = None
    written: int = 0
    outcomes: queue.SimpleQueue[Outcome] = field(default_factory=queue.SimpleQueue)
    is_left: bool = False

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def tokens(self) -> Iterator[int]:
        """Yield tokens as they are written. The request is left when the iterator is closed.

        Raises:
            Failed: If the model could not go on.
        """
        try:
            while isinstance(token := self.outcomes.get(), int):
                yield token
            if isinstance(token, Exception):
                raise token
        finally:
            self.is_left = True

    def read(self) -> Reading:
        """Wait until all is read, of a request that writes nothing; return where the model stands then.

        Raises:
            Failed: If the model could not go on, or the request was left.
        """
        outcome = self.outcomes.get()
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is None:
            raise Failed("the client has left")
        return outcome


class Batcher:
    """One thread that runs the model for all requests, a token of each at a time.

    Prompts are read in pieces, between which the others go on. A pass writes a token of every other request. Mixers run
    once for all that stand at the same place: with memories alone, which keep no token, one within a chunk.

    Args:
        model: Model, in evaluation mode.
        most: Most requests at a time; others are refused.

    Attributes:
        tokens_read: Prompt tokens read so far, by all requests.
        passes: Forward passes that wrote tokens so far.
    """

    def __init__(self, model: Model, *, most: int = 64):
        self.model, self.most, self.tokens_read, self.passes = model, most, 0, 0
        self._period = period(model.config)
        self._inbox: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._open, self._lock, self._is_closed = 0, threading.Lock(), False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)

    def __enter__(self) -> Batcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._inbox.put(None)
        self._thread.join()

    @property
    def num_open(self) -> int:
        """Number of requests that are not answered yet."""
        return self._open

    def submit(self, request: Request) -> Request:
        """Take a request.

        Raises:
            Busy: If there are `most` of them already.
            Failed: If it has stopped.
        """
        with self._lock:
            if self._is_closed:
                raise Failed("the server stops")
            if self._open >= self.most:
                raise Busy(f"{self.most} requests are being answered, as many as --max-requests allows", "try again")
            self._open += 1
        self._inbox.put(request)
        return request

    def _end(self, request: Request, outcome: Outcome) -> None:
        with self._lock:
            self._open -= 1
        request.outcomes.put(outcome)

    def _run(self) -> None:
        reading: list[Request] = []
        batches: dict[int, _Batch] = {}
        try:
            self._work(reading, batches)
        finally:
            with self._lock:
                self._is_closed = True
            waiting = [request for batch in batches.values() for request in batch.requests]
            while not self._inbox.empty():
                waiting += filter(None, [self._inbox.get()])
            for request in [*reading, *waiting]:
                self._end(request, Failed("the server stops"))

    def _work(self, reading: list[Request], batches: dict[int, _Batch]) -> None:
        while True:
            wait = not reading and not batches
            while (request := self._next(wait)) is not None:
                reading.append(request)
                wait = False
            if self._is_closed:
                return
            room = PREFILL_TOKENS
            while reading and room > 0:
                room -= self._read_piece(reading, room, batches)
            going = [each for batch in batches.values() if (each := self._choose_all(batch))]
            batches.clear()
            batches |= {self._place(batch): batch for batch in self._write(going)}

    def _next(self, wait: bool) -> Request | None:
        try:
            request = self._inbox.get(block=wait)
        except queue.Empty:
            return None
        self._is_closed = self._is_closed or request is None
        return request

    def _place(self, batch: _Batch) -> int:
        position = batch.reading.state.position
        return position if self._period is None else position % self._period

    def _read_piece(self, waiting: list[Request], most: int, batches: dict[int, _Batch]) -> int:
        """Read at most so many tokens of the first prompt, and count them; after all of them the request writes."""
        request = waiting.pop(0)
        if request.is_left:
            self._end(request, None)
            return 0
        piece, request.ids = request.ids[:most], request.ids[most:]
        try:
            if piece:
                device = next(self.model.parameters()).device
                state = request.reading and request.reading.state
                request.reading = prefill(self.model, torch.tensor([list(piece)], device=device), state)
                self.tokens_read += len(piece)
        except Exception as error:  # the next request shall be answered all the same
            logger.exception("a prompt could not be read")
            self._end(request, Failed(f"the model could not read: {error}"))
            return len(piece)
        if request.ids:
            waiting.append(request)
        elif not request.max_tokens:
            self._end(request, request.reading)
        else:
            self._begin(request, batches)
        return len(piece)

    def _begin(self, request: Request, batches: dict[int, _Batch]) -> None:
        """Let a request write from now on, together with those at its place."""
        batch = _Batch([request], request.reading)
        place = self._place(batch)
        try:
            batches[place] = batches[place].joined(batch) if place in batches else batch
        except Exception as error:  # memory that there is not, of two large states
            logger.exception("requests could not be put together")
            self._end(request, Failed(f"the model could not go on: {error}"))

    def _choose_all(self, batch: _Batch) -> _Batch | None:
        """Choose a token of each request; return those that go on, and their tokens."""
        tokens = [self._choose(batch, row) for row in range(len(batch.requests))]
        kept = [row for row, token in enumerate(tokens) if token is not None]
        if not kept:
            return None
        try:
            return replace(batch.rows(kept), tokens=[tokens[row] for row in kept])
        except Exception as error:
            self._fail([batch.requests[row] for row in kept], error)
            return None

    def _write(self, batches: list[_Batch]) -> list[_Batch]:
        """Read the chosen tokens of all batches in one pass."""
        if not batches:
            return []
        sizes = [len(batch.requests) for batch in batches]
        try:
            device = batches[0].reading.logits.device
            tokens = torch.tensor([[token] for batch in batches for token in batch.tokens], device=device)
            state = ModelState.of_groups([batch.reading.state for batch in batches], sizes)
            self.passes += 1
            logits, state = prefill(self.model, tokens, state)
            parts = zip(batches, logits.split(sizes), state.apart(), strict=True)
            return [_Batch(batch.requests, Reading(part, each)) for batch, part, each in parts]
        except Exception as error:
            self._fail([request for batch in batches for request in batch.requests], error)
            return []

    def _fail(self, requests: list[Request], error: Exception) -> None:
        logger.exception("tokens could not be written")
        for request in requests:
            self._end(request, Failed(f"the model could not go on: {error}"))

    def _choose(self, batch: _Batch, row: int) -> int | None:
        """Choose the next token of a request and hand it out; None if no other one is to follow."""
        request = batch.requests[row]
        try:
            token = int(sample(batch.reading.logits[row : row + 1], request.sampling, request.generator))
        except Exception as error:  # of this request alone, as where what it predicts is not a number
            logger.exception("no token could be chosen")
            self._end(request, Failed(f"the model could not go on: {error}"))
            return None
        return token if self._goes_on(request, token) else None

    def _goes_on(self, request: Request, token: int) -> bool:
        """Hand out a token; tell whether another one is to follow."""
        if request.is_left or token == request.end:
            self._end(request, None)
            return False
        request.written += 1
        request.outcomes.put(token)
        if request.written == request.max_tokens:
            self._end(request, None)
            return False
        return True


@dataclass(frozen=True)
class _Batch:
    """Requests at the same place, where the model stands with them, and the tokens that it is to read next."""

    requests: list[Request]
    reading: Reading
    tokens: Sequence[int] = ()

    def rows(self, rows: list[int]) -> _Batch:
        """Keep some requests."""
        if len(rows) == len(self.requests):
            return self
        index = torch.tensor(rows, device=self.reading.logits.device)
        tensors = [{name: x.index_select(0, index) for name, x in each.items()} for each in _tensors(self.reading)]
        return _Batch([self.requests[row] for row in rows], _rebuilt(self.reading, tensors))

    def joined(self, other: _Batch) -> _Batch:
        """Put requests at the same place together."""
        pairs = zip(_tensors(self.reading), _tensors(other.reading), strict=True)
        tensors = [{name: torch.cat([a[name], b[name]]) for name in a} for a, b in pairs]
        return _Batch(self.requests + other.requests, _rebuilt(self.reading, tensors))


def period(model: ModelConfig) -> int | None:
    """Return the tokens after which it no longer matters how many a model has read; None if it always does."""
    sizes = []
    for mixer in model.mixers.values():
        if isinstance(mixer, AttentionConfig | TitansConfig):
            return None
        if isinstance(mixer, LinearAttentionConfig) and mixer.rotary:
            return None
        if isinstance(mixer, SelfModifyingConfig):
            far = 1 if mixer.far is None else mixer.far.chunk_size
            sizes += [projection_chunk_size(mixer), mixer.reset_every or 1, far]
        elif isinstance(mixer, TttConfig):
            sizes.append(mixer.chunk_size)
    return math.lcm(*sizes)


def _tensors(reading: Reading) -> list[dict[str, Tensor]]:
    return [{"logits": reading.logits}, *(layer.named() for layer in reading.state.layers)]


def _rebuilt(reading: Reading, tensors: list[dict[str, Tensor]]) -> Reading:
    layers = zip(reading.state.layers, tensors[1:], strict=True)
    return Reading(tensors[0]["logits"], ModelState(tuple(layer.with_named(each) for layer, each in layers)))
