"""`hopescale serve` over HTTP, asked by the real client of OpenAI."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

fastapi = pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

import torch  # noqa: E402

from hopescale.infer.load import LoadedModel, load_model  # noqa: E402
from hopescale.serve.app import Limits, Server, make_app  # noqa: E402
from hopescale.serve.batcher import Batcher, Request  # noqa: E402
from hopescale.serve.contexts import Contexts  # noqa: E402

SIZES = (
    *("model.d_model=16", "model.num_layers=1", "model.mixers.hope.chunk_size=8", "model.vocab_size=300"),
    *(f"model.cms.levels.{level}.d_ff=16" for level in ("fast", "mid", "slow")),
    *("train.steps=4", "train.seq_len=16", "train.micro_batch_size=2", "train.global_batch_tokens=32"),
    *("train.validation.every=null", "optim.schedule.warmup_steps=1", "log.trackers=[]", "data.sources.markov=null"),
)
TEXT = "note 7: memory level token state reads writes keeps a the state"
QUESTION = " memory reads"


@pytest.fixture(scope="module")
def trained(hopescale, text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("serve") / "run"
    done = hopescale("train", "debug", *SIZES, f"data.sources.text.path={text_data / 'data'}", "--run-dir", run)
    assert done.code == 0, done.err
    return run


@pytest.fixture(scope="module")
def loaded(trained: Path) -> LoadedModel:
    """The model in float64: what is computed beside other requests then never differs by a tie."""
    found = load_model(trained, torch.device("cpu"))
    found.model.double()
    return found


class Served:
    """A server of a model on a free port of this machine."""

    def __init__(
        self, loaded: LoadedModel, folder: Path | None = None, *, most: int = 64, limits: Limits | None = None
    ):
        self.batcher = Batcher(loaded.model, most=most)
        self.server = Server(loaded, "tiny", self.batcher, Contexts(loaded, folder, most=2), limits or Limits())
        self.web = uvicorn.Server(uvicorn.Config(make_app(self.server), port=0, log_level="warning"))

    def __enter__(self) -> Served:
        self.batcher.__enter__()
        self.thread = threading.Thread(target=self.web.run, daemon=True)
        self.thread.start()
        while not self.web.started:
            time.sleep(0.02)
        self.url = f"http://127.0.0.1:{self.web.servers[0].sockets[0].getsockname()[1]}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        self.http = httpx.Client(base_url=self.url, timeout=60)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.client.close()
        self.web.should_exit = True
        self.thread.join()
        self.batcher.__exit__()

    def ask(self, prompt: str = TEXT, **options):
        options = {"max_tokens": 12, "temperature": 0, **options}
        return self.client.completions.create(model="tiny", prompt=prompt, **options)


@pytest.fixture(scope="module")
def served(loaded: LoadedModel) -> Iterator[Served]:
    with Served(loaded) as running:
        yield running


def test_greedy_answers_are_those_of_generate(served: Served, hopescale, trained: Path):
    found = served.ask()
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    alone = hopescale("generate", trained, "--prompt", TEXT, "--max-tokens", 12)
    assert alone.out == f"{TEXT}{found.choices[0].text}\n"
    assert found.choices[0].finish_reason in ("length", "stop")
    usage = found.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and usage.completion_tokens <= 12


def test_a_stream_is_the_whole_answer_in_pieces(served: Served):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = served.ask(**options)
    whole = served.ask()
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == whole.choices[0].finish_reason
    assert last.usage == whole.usage


def test_a_seed_decides_what_is_drawn(served: Served):
    one, again, other = (served.ask(temperature=2.0, seed=seed).choices[0].text for seed in (1, 1, 2))
    assert one == again != other
    assert len({served.ask(temperature=2.0).choices[0].text for _ in range(3)}) > 1


def test_a_stop_ends_the_answer_before_it(served: Served):
    whole = served.ask(max_tokens=30).choices[0].text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    found = served.ask(max_tokens=30, stop=["never to be seen", stop])
    assert found.choices[0].text == whole[: whole.index(stop)] and found.choices[0].finish_reason == "stop"
    streamed = "".join(chunk.choices[0].text for chunk in served.ask(max_tokens=30, stop=stop, stream=True))
    assert streamed == found.choices[0].text


def test_a_context_is_read_once_for_all_questions(loaded: LoadedModel):
    with Served(loaded) as served:
        put = served.http.put("/contexts/notes", json={"text": TEXT}).json()
        before = served.batcher.tokens_read
        assert put["name"] == "notes" and put["tokens"] == before > 10
        questions = [f"{QUESTION} {word}" for word in ("state", "level", "token")]
        answers = [served.ask(question, extra_body={"context": "notes"}) for question in questions]
        read = served.batcher.tokens_read - before
        assert read == sum(answer.usage.prompt_tokens - put["tokens"] for answer in answers)
        assert all(answer.usage.prompt_tokens_details.cached_tokens == put["tokens"] for answer in answers)
        encode = loaded.tokenizer.encode
        for question, answer in zip(questions, answers, strict=True):
            ids = [loaded.tokenizer.eos_id, *encode(TEXT), *encode(question)]
            assert served.ask(ids).choices[0].text == answer.choices[0].text


def test_a_context_goes_on_from_another_and_from_plain_text(served: Served):
    assert (
        served.http.put("/contexts/a", content=TEXT.encode(), headers={"content-type": "text/plain"}).status_code == 200
    )
    longer = served.http.put("/contexts/b", json={"text": QUESTION, "onto": "a"}).json()
    assert longer["tokens"] == served.http.get("/contexts/a").json()["tokens"] + longer["tokens_read"]
    assert served.http.get("/contexts").json() == {"contexts": ["a", "b"]}
    third = served.http.put("/contexts/c", json={"text": TEXT})
    assert third.status_code == 400 and "--max-contexts allows" in third.json()["error"]["message"]
    assert served.http.delete("/contexts/a").json() == {"name": "a", "deleted": True}
    assert served.http.get("/contexts/a").status_code == 404


def test_contexts_outlive_the_server(loaded: LoadedModel, tmp_path: Path):
    with Served(loaded, tmp_path / "contexts") as served:
        served.http.put("/contexts/notes", json={"text": TEXT})
        answer = served.ask(QUESTION, extra_body={"context": "notes"}).choices[0].text
    with Served(loaded, tmp_path / "contexts") as served:
        assert served.http.get("/contexts").json() == {"contexts": ["notes"]}
        assert served.ask(QUESTION, extra_body={"context": "notes"}).choices[0].text == answer
        (tmp_path / "contexts" / "notes" / "state.pt").write_bytes(b"damaged")
    with Served(loaded, tmp_path / "contexts") as served, pytest.raises(openai.InternalServerError, match="damaged"):
        served.ask(QUESTION, extra_body={"context": "notes"})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt": ""}, None, None),
        ({"prompt": []}, openai.BadRequestError, "the prompt is empty"),
        ({"prompt": [5, 300]}, openai.BadRequestError, "the prompt has the token 300, the vocabulary ends at 299"),
        ({"max_tokens": 41}, openai.BadRequestError, "max_tokens is 41, --max-tokens allows 40"),
        ({"prompt": TEXT * 9}, openai.BadRequestError, "--max-prompt-tokens allows 60"),
        ({"model": "gpt"}, openai.NotFoundError, "there is no model 'gpt'"),
        ({"n": 2}, openai.BadRequestError, "n: Input should be less than or equal to 1"),
        (
            {"prompt": ["a", "b"]},
            openai.BadRequestError,
            "prompt: Input should be one text, or one list of token ids",
        ),
        ({"logprobs": 3}, openai.BadRequestError, "logprobs: Extra inputs are not permitted"),
        ({"extra_body": {"context": "none"}}, openai.NotFoundError, "there is no context 'none'"),
    ],
)
def test_what_cannot_be_answered_is_one_message(loaded, options: dict, error: type | None, message: str | None):
    with Served(loaded, limits=Limits(60, 40)) as served:
        options = {"model": "tiny", "prompt": TEXT, "temperature": 0, "max_tokens": 2, **options}
        if error is None:
            served.client.completions.create(**options)
            return
        with pytest.raises(error) as caught:
            served.client.completions.create(**options)
        assert message in str(caught.value)


def test_what_is_not_there_is_told_with_what_is(served: Served):
    with pytest.raises(openai.NotFoundError, match="there is no POST /v1/chat/completions here, but POST") as caught:
        served.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hello"}])
    assert "have no chat form" in str(caught.value)
    assert "there is no GET /v1/completions here" in served.http.get("/v1/completions").text


@pytest.mark.parametrize("name", [".hidden", "a b", "x" * 65])
def test_a_name_that_is_no_folder_is_refused(served: Served, name: str):
    found = served.http.put(f"/contexts/{name}", json={"text": TEXT})
    assert found.status_code == 400 and "is no name of a context" in found.json()["error"]["message"]


def test_many_requests_share_passes_and_answer_as_alone(loaded: LoadedModel):
    prompts = [f"note {number}: {'memory ' * (1 + number % 3)}" for number in range(10, 26)]
    with Served(loaded) as served:
        alone = [served.ask(prompt, max_tokens=16).choices[0].text for prompt in prompts]
        passes = served.batcher.passes
        with ThreadPoolExecutor(len(prompts)) as pool:
            together = list(pool.map(lambda prompt: served.ask(prompt, max_tokens=16).choices[0].text, prompts))
        assert together == alone
        assert served.batcher.passes - passes < passes, "requests at the same place share a pass"
        assert served.http.get("/health").json()["requests"] == 0


def test_one_request_too_many_is_told_to_come_again(loaded: LoadedModel):
    with Served(loaded, most=1) as served:
        stream = served.ask(max_tokens=2000, temperature=1.0, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="as many as --max-requests allows"):
            served.ask()
        stream.close()
        assert waited_for(lambda: served.batcher.num_open == 0), "a stream that nobody reads is left"
        assert served.ask().choices[0].text is not None


def test_a_client_that_hangs_up_frees_its_place(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    with Served(loaded, most=1) as served, monkeypatch.context() as patch:
        submit = served.batcher.submit
        patch.setattr(served.batcher, "submit", lambda request: submit(replace(request, end=None)))
        asked = {"prompt": TEXT, "max_tokens": 4096, "temperature": 1.0, "seed": 3}
        with pytest.raises(httpx.ReadTimeout):
            served.http.post("/v1/completions", json=asked, timeout=0.3)
        assert waited_for(lambda: served.batcher.num_open == 0)
        assert served.batcher.passes < 4000, "nobody waits for the rest"
        assert served.ask().choices[0].text is not None


def test_an_error_ends_its_request_alone(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch):
    with Served(loaded) as served:
        with monkeypatch.context() as patch:
            patch.setattr("hopescale.serve.batcher.prefill", lambda *_: (_ for _ in ()).throw(RuntimeError("planted")))
            with pytest.raises(openai.InternalServerError):
                served.ask()
        assert served.ask().choices[0].finish_reason in ("length", "stop") and served.batcher.num_open == 0


Serve = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def serve(hopescale, trained: Path, monkeypatch) -> Serve:
    """Run the command, and beside it something with its address and port; return its exit code and lines."""

    def run(beside: Callable[[str, int], None], *options: object) -> tuple[int, list[str]]:
        lines, failed = [], []

        def guarded(url: str, port: int) -> None:
            try:
                beside(url, port)
            except BaseException as error:
                failed.append(error)
                os.kill(os.getpid(), signal.SIGINT)

        def echo(line: str, *, err: bool = False) -> None:
            if err:
                return
            lines.append(line)
            if len(lines) == 1:
                url, port = re.search(r"(http://127.0.0.1:(\d+))/v1", line).groups()
                threading.Thread(target=guarded, args=(url, int(port)), daemon=True).start()

        monkeypatch.setattr("typer.echo", echo)
        done = hopescale("serve", trained, "--port", 0, "--name", "tiny", *options)
        assert not failed, failed
        return done.code, lines

    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_the_command_listens_when_it_says_so_and_a_signal_ends_it(number, serve):
    answered = []

    def ask_and_end(url: str, port: int) -> None:
        socket.create_connection(("127.0.0.1", port)).close()
        answered.append(httpx.get(f"{url}/health").status_code)
        os.kill(os.getpid(), number)

    code, lines = serve(ask_and_end)
    assert code == 0 and answered == [200]
    assert lines[1:] == ["tiny: the server has stopped"]


UNFINISHED = b"PUT /contexts/a HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nbegun"
"""A request that its client never ends."""


@pytest.mark.parametrize(("grace", "kills"), [(600, 2), (1, 1)], ids=["second signal", "grace"])
def test_a_client_that_hangs_does_not_keep_the_server(grace, kills, serve, capfd):
    def hang(url: str, port: int) -> None:
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(UNFINISHED)
        httpx.get(f"{url}/health")
        for _ in range(kills):
            os.kill(os.getpid(), signal.SIGTERM)
            assert waited_for(lambda: refuses(port)), "the first signal closes the port"

    code, lines = serve(hang, "--grace", grace)
    assert code == 0 and lines[1:] == ["tiny: the server has stopped"]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("stream", [True, False])
def test_a_second_signal_cuts_off_an_answer_that_is_being_written(stream, serve, monkeypatch, capfd):
    submit = Batcher.submit

    def write_for_ever(self: Batcher, request: Request) -> Request:
        request.end, request.max_tokens = None, 10**9
        return submit(self, request)

    monkeypatch.setattr(Batcher, "submit", write_for_ever)

    def cut_off(url: str) -> None:
        with suppress(httpx.TransportError):
            httpx.post(f"{url}/v1/completions", json={"prompt": TEXT, "stream": stream}, timeout=60)

    def ask(url: str, port: int) -> None:
        threading.Thread(target=cut_off, args=(url,), daemon=True).start()
        assert waited_for(lambda: httpx.get(f"{url}/health").json()["requests"] == 1)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            assert waited_for(lambda: refuses(port)), "the first signal closes the port"

    assert serve(ask)[0] == 0
    assert "Traceback" not in capfd.readouterr().err


def test_what_is_read_and_where_to_listen_is_said_before_it_is_done(hopescale, tmp_path: Path):
    for options, where in (((), "http://127.0.0.1:8000"), (("--host", "::1", "--port", 0), "a free port of [::1]")):
        done = hopescale("serve", tmp_path / "run", *options)
        assert done.err.splitlines()[0] == f"reading {tmp_path / 'run'}, to listen at {where}"
        assert (done.code, done.out) == (4, "") and "holds no checkpoint" in done.err


def test_a_port_that_is_taken_is_one_message(hopescale, trained: Path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        done = hopescale("serve", trained, "--port", listening.getsockname()[1])
    assert done.code == 5 and "cannot listen at 127.0.0.1:" in done.err and "Address already in use" in done.err
    done = hopescale("serve", trained, "--host", "192.0.2.1", "--port", 0)
    assert done.code == 5 and "cannot listen at 192.0.2.1:0" in done.err
    bind = socket.socket.bind
    with socket.socket() as first:

        def bind_second(self: socket.socket, address: tuple[str, int]) -> None:
            bind(self, address)
            first.listen()

        first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        first.bind(("127.0.0.1", 0))
        monkeypatch.setattr("socket.socket.bind", bind_second)
        done = hopescale("serve", trained, "--port", first.getsockname()[1])
    assert done.code == 5 and "cannot listen at 127.0.0.1:" in done.err


def refuses(port: int) -> bool:
    with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return False
    return True


def waited_for(condition: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()
