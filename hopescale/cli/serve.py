"""`hopescale serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from hopescale.cli.eval import load
from hopescale.cli.options import Levels, require_packages


def serve(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A run folder, a checkpoint, or an export of `convert to-hf`.")
    ],
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than loopback let anybody ask.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="Name of the model.", show_default="the run's")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    contexts: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep named contexts here; they are there after a restart.")
    ] = None,
    levels: Levels = None,
    max_requests: Annotated[int, typer.Option(min=1, help="Most requests at a time; others get status 429.")] = 64,
    max_contexts: Annotated[int, typer.Option(min=1, help="Most named contexts in memory.")] = 64,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a prompt or context.")] = 131_072,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 4096,
    grace: Annotated[
        int, typer.Option(min=0, metavar="SECONDS", help="Time for answers that are being written, after a signal.")
    ] = 60,
) -> None:
    """Answer OpenAI's completions over HTTP; a context is read once and asked any number of times.

    Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP end it with exit code 0, after the answers that are being written, for which
    there are --grace seconds; a second signal cuts them off.
    """
    require_packages("a server needs", "serve", "fastapi", "uvicorn")
    address = f"[{host}]" if ":" in host else host
    where = f"http://{address}:{port}" if port else f"a free port of {address}"
    typer.echo(f"reading {checkpoint}, to listen at {where}", err=True)
    # Threads that spin while they wait for one another lose to any other process of the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from hopescale.parallel.device import choose_device
    from hopescale.serve.app import Limits, Server, make_app
    from hopescale.serve.batcher import Batcher
    from hopescale.serve.contexts import Contexts
    from hopescale.serve.web import WebServer

    loaded = load(checkpoint, choose_device(device, "--device"), levels)
    kept = Contexts(loaded, contexts, most=max_contexts)
    with Batcher(loaded.model, most=max_requests) as batcher:
        server = Server(loaded, name or loaded.config.name, batcher, kept, Limits(max_prompt_tokens, max_tokens))
        web = WebServer(make_app(server), host, port, grace)
        typer.echo(f"{server.name} at http://{address}:{web.port}/v1, named contexts at /contexts/NAME")
        web.answer()
        typer.echo(f"{server.name}: the server has stopped")
