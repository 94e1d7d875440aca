"""The HTTP interface: OpenAI's completions, and named contexts. Errors have OpenAI's shape."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

from anyio.to_thread import current_default_thread_limiter
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import iterate_in_threadpool, run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from hopescale.common.errors import CheckpointError, HopescaleError
from hopescale.infer.load import LoadedModel
from hopescale.infer.sampling import Sampling
from hopescale.infer.text import decode_stream, encode_prompt
from hopescale.serve import batcher
from hopescale.serve.batcher import Batcher, Busy, Failed
from hopescale.serve.contexts import Contexts, NoContext


@dataclass(frozen=True)
class Limits:
    """Limits of one request.

    Attributes:
        prompt_tokens: Most tokens of a prompt or context.
        max_tokens: Most tokens to write.
    """

    prompt_tokens: int = 131_072
    max_tokens: int = 4096


class CompletionRequest(BaseModel):
    """Parameters of `/v1/completions`; other keys of OpenAI's are refused, as they would be without effect."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | list[int]
    model: str | None = None
    max_tokens: int = Field(default=16, ge=1)
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: int = Field(default=1, ge=1, le=1)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    user: str | None = None
    context: str | None = None


class ContextRequest(BaseModel):
    """Parameters of `PUT /contexts/NAME`."""

    model_config = ConfigDict(extra="forbid")

    text: str
    onto: str | None = None


class Server:
    """The answers of one model.

    Args:
        loaded: Model and tokenizer.
        name: Name of the model, as clients see it.
        running: Batcher that runs the model.
        contexts: Named contexts.
        limits: Limits of a request.
    """

    def __init__(self, loaded: LoadedModel, name: str, running: Batcher, contexts: Contexts, limits: Limits):
        self.loaded, self.name, self.batcher, self.contexts, self.limits = loaded, name, running, contexts, limits

    def encode(self, text: str | list[int], *, goes_on: bool) -> list[int]:
        """Turn a prompt into ids, as `hopescale generate` does; ids that are given stay.

        Raises:
            HopescaleError: If there are none, too many, or some that the vocabulary does not have.
        """
        size = self.loaded.config.model.vocab_size
        ids = list(text)
        if isinstance(text, str):
            ids = encode_prompt(text, self.loaded.tokenizer, size, goes_on=goes_on)
        if not ids and not goes_on:
            raise HopescaleError("the prompt is empty")
        if wrong := [id for id in ids if not 0 <= id < size]:
            raise HopescaleError(f"the prompt has the token {wrong[0]}, the vocabulary ends at {size - 1}")
        if len(ids) > self.limits.prompt_tokens:
            most = self.limits.prompt_tokens
            raise HopescaleError(f"the prompt has {len(ids)} tokens, --max-prompt-tokens allows {most}")
        return ids

    def read(self, name: str, body: ContextRequest) -> _ContextReading:
        """Begin to read a text once, after that of another context if `onto` names one."""
        self.contexts.check(name)
        before = None if body.onto is None else self.contexts.get(body.onto)
        ids = self.encode(body.text, goes_on=before is not None)
        request = self.batcher.submit(batcher.Request(ids, before and before.reading, max_tokens=0))
        return _ContextReading(self.contexts, name, request, len(ids))

    def begin(self, body: CompletionRequest) -> _Completion:
        """Begin to answer."""
        if body.model not in (None, self.name):
            raise HTTPException(404, f"there is no model {body.model!r}: this server has {self.name!r}")
        if body.max_tokens > self.limits.max_tokens:
            most = self.limits.max_tokens
            raise HopescaleError(f"max_tokens is {body.max_tokens}, --max-tokens allows {most}")
        before = None if body.context is None else self.contexts.get(body.context)
        ids = self.encode(body.prompt, goes_on=before is not None)
        sampling = Sampling()
        if body.temperature > 0:
            sampling = Sampling(body.temperature, top_p=None if body.top_p == 1 else body.top_p)
        tokenizer = self.loaded.tokenizer
        request = batcher.Request(
            ids,
            before and before.reading,
            body.max_tokens,
            sampling,
            secrets.randbits(62) if body.seed is None else body.seed,
            None if tokenizer is None else tokenizer.eos_id,
        )
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        known = 0 if before is None else before.tokens
        return _Completion(self, self.batcher.submit(request), len(ids), known, [stop for stop in stops if stop])


class _Answer(Protocol):
    """An answer that a client waits for while the batcher works on it."""

    request: batcher.Request

    def whole(self) -> dict[str, Any]:
        """Wait for it."""


@dataclass(frozen=True)
class _ContextReading:
    """A context that is being read."""

    contexts: Contexts
    name: str
    request: batcher.Request
    num_read: int

    def whole(self) -> dict[str, Any]:
        """Wait until it is read, and keep it."""
        context = self.contexts.put(self.name, self.request.read())
        return {"name": self.name, "tokens": context.tokens, "tokens_read": self.num_read}


class _Completion:
    """One answer, as it is written."""

    def __init__(self, server: Server, request: batcher.Request, num_read: int, num_known: int, stops: list[str]):
        self.server, self.request, self.stops = server, request, stops
        self.num_read, self.num_known = num_read, num_known
        self.finish: str | None = None
        self.head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time())}
        self.head["model"] = server.name

    def pieces(self) -> Iterator[str]:
        """Yield the text as it is written, up to a stop, of which nothing is shown."""
        held, tokens = "", self.request.tokens()
        try:
            for piece in decode_stream(tokens, self.server.loaded.tokenizer):
                held += piece
                if found := [place for stop in self.stops if (place := held.find(stop)) >= 0]:
                    self.finish = "stop"
                    if held[: min(found)]:
                        yield held[: min(found)]
                    return
                safe = len(held) - max((_overlap(held, stop) for stop in self.stops), default=0)
                if safe:
                    yield held[:safe]
                    held = held[safe:]
            if held:
                yield held
            self.finish = "length" if self.request.written == self.request.max_tokens else "stop"
        finally:
            tokens.close()

    def usage(self) -> dict[str, Any]:
        """Count tokens; those of a context were read before."""
        prompt, written = self.num_known + self.num_read, self.request.written
        counts = {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}
        return counts | {"prompt_tokens_details": {"cached_tokens": self.num_known}}

    def whole(self) -> dict[str, Any]:
        """Wait for the answer."""
        text = "".join(self.pieces())
        return {**self.head, "choices": [self._choice(text)], "usage": self.usage()}

    def events(self, *, with_usage: bool) -> Iterator[str]:
        """Yield the answer as server-sent events."""
        try:
            for piece in self.pieces():
                yield _event({**self.head, "choices": [self._choice(piece, ended=False)]})
            yield _event({**self.head, "choices": [self._choice("")]})
            if with_usage:
                yield _event({**self.head, "choices": [], "usage": self.usage()})
        except Exception as error:  # the answer has begun: no status can tell of it
            yield _event(_error(str(error), "server_error"))
        yield "data: [DONE]\n\n"

    def _choice(self, text: str, *, ended: bool = True) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": self.finish if ended else None}


@asynccontextmanager
async def _leaving(client: Request, request: batcher.Request) -> AsyncIterator[None]:
    """Leave a request, within the block, once its client hangs up: its place in the batch is free for another."""

    async def watch() -> None:
        while (await client.receive())["type"] != "http.disconnect":
            pass
        request.is_left = True

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()


async def _awaited(client: Request, answer: _Answer) -> dict[str, Any]:
    async with _leaving(client, answer.request):
        return await run_in_threadpool(answer.whole)


async def _streamed(client: Request, answer: _Completion, *, with_usage: bool) -> AsyncIterator[str]:
    async with _leaving(client, answer.request):
        async for event in iterate_in_threadpool(answer.events(with_usage=with_usage)):
            yield event


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _error(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _context_request(request: Request, body: bytes) -> ContextRequest:
    """Read a body: JSON if it says so, else the text itself."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        try:
            return ContextRequest(text=body.decode())
        except UnicodeDecodeError as error:
            raise HopescaleError(f"the context is not UTF-8: {error}") from None
    try:
        return ContextRequest.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from None


KINDS = {
    Busy: (429, "rate_limit_error"),
    NoContext: (404, "invalid_request_error"),
    Failed: (500, "server_error"),
    CheckpointError: (500, "server_error"),
}
"""Status and OpenAI's word for errors that are no mistake in the request."""


ROUTES = "POST /v1/completions, GET /v1/models, GET /health, GET /contexts, and PUT, GET, DELETE /contexts/NAME"
_FORMS = {
    "prompt": "Input should be one text, or one list of token ids",
    "stop": "Input should be a text, or a list of texts",
}
"""What keys of several forms should be."""


def make_app(server: Server) -> FastAPI:
    """Return the web application of a server."""

    @asynccontextmanager
    async def threads_for_all(_: FastAPI) -> AsyncIterator[None]:
        # Each request that is being answered waits on a thread of its own.
        current_default_thread_limiter().total_tokens = server.batcher.most + 16
        yield

    app = FastAPI(title="hopescale", docs_url=None, redoc_url=None, lifespan=threads_for_all)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        running = server.batcher
        return {"status": "ok", "requests": running.num_open, "tokens_read": running.tokens_read}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": server.name, "object": "model", "owned_by": "hopescale"}]}

    @app.post("/v1/completions")
    async def complete(body: CompletionRequest, request: Request) -> Any:
        answer = await run_in_threadpool(server.begin, body)
        if not body.stream:
            return await _awaited(request, answer)
        with_usage = bool((body.stream_options or {}).get("include_usage"))
        return StreamingResponse(_streamed(request, answer, with_usage=with_usage), media_type="text/event-stream")

    @app.get("/contexts")
    def contexts() -> dict[str, Any]:
        return {"contexts": server.contexts.names()}

    @app.put("/contexts/{name}")
    async def put(name: str, request: Request) -> dict[str, Any]:
        body = _context_request(request, await request.body())
        return await _awaited(request, await run_in_threadpool(server.read, name, body))

    @app.get("/contexts/{name}")
    def get(name: str) -> dict[str, Any]:
        context = server.contexts.get(name)
        return {"name": name, "tokens": context.tokens}

    @app.delete("/contexts/{name}")
    def delete(name: str) -> dict[str, Any]:
        server.contexts.delete(name)
        return {"name": name, "deleted": True}

    @app.exception_handler(HopescaleError)
    def refused(_: Request, error: HopescaleError) -> JSONResponse:
        status, kind = KINDS.get(type(error), (400, "invalid_request_error"))
        hint = f" ({error.hint})" if error.hint else ""
        return JSONResponse(_error(f"{error.message}{hint}", kind), status)

    @app.exception_handler(StarletteHTTPException)
    def not_found(request: Request, error: StarletteHTTPException) -> JSONResponse:
        message = str(error.detail)
        if message in (HTTPStatus.NOT_FOUND.phrase, HTTPStatus.METHOD_NOT_ALLOWED.phrase):  # of no route of ours
            chat = "; models here continue text, and have no chat form" if "chat" in request.url.path else ""
            message = f"there is no {request.method} {request.url.path} here, but {ROUTES}{chat}"
        return JSONResponse(_error(message, "invalid_request_error"), error.status_code)

    @app.exception_handler(ClientDisconnect)
    def left(_: Request, error: ClientDisconnect) -> JSONResponse:
        return JSONResponse(_error("the client has left before its request ended", "invalid_request_error"), 400)

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        # A prompt is refused once for each form that it might have.
        problems = {one["loc"][1:][0] if one["loc"][1:] else "body": one for one in error.errors()}
        texts = [f"{key}: {_FORMS.get(key, one['msg'])}" for key, one in problems.items()]
        return JSONResponse(_error("; ".join(texts), "invalid_request_error"), 400)

    return app
