"""`hopescale generate`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from hopescale.cli.options import Levels
from hopescale.cli.progress import progress_bar
from hopescale.common.disk import staged_folder
from hopescale.common.errors import CheckpointError, ConfigError, DataError


def generate(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="A run folder (its latest checkpoint) or a checkpoint folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue; `-` reads standard input.")] = "",
    max_tokens: Annotated[int, typer.Option(min=0, help="Most tokens to write.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Choose among so many likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among tokens that reach this probability.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the choice.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    load_state: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Go on from what --save-state has kept.")
    ] = None,
    save_state: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep the memory of all that was read and written.")
    ] = None,
    levels: Levels = None,
) -> None:
    """Continue a prompt, token by token, from the state a model carries."""
    # Threads that spin while they wait for one another lose to any other process of the machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    from hopescale.infer.generate import GeneratedToken, prefill
    from hopescale.infer.generate import generate as run
    from hopescale.infer.level_state import put_levels
    from hopescale.infer.load import load_model
    from hopescale.infer.sampling import Sampling
    from hopescale.infer.state import read_state, write_state
    from hopescale.infer.text import decode_stream, encode_prompt
    from hopescale.parallel.device import choose_device

    sampling = Sampling(temperature, top_k, top_p)
    if not max_tokens and save_state is None:
        hint = "say where to keep what was read: --save-state FOLDER"
        raise ConfigError("--max-tokens 0 has no effect without --save-state", hint)
    place = choose_device(device, "--device")
    with ExitStack() as stack:
        folder = save_state and stack.enter_context(staged_folder(save_state, CheckpointError))
        loaded = load_model(checkpoint, place)
        if levels is not None:
            put_levels(levels, loaded)
        model, tokenizer = loaded.model, loaded.tokenizer
        reading = load_state and read_state(load_state, loaded)
        text = _standard_input() if prompt == "-" else prompt
        ids = encode_prompt(text, tokenizer, loaded.config.model.vocab_size, goes_on=reading is not None)
        if ids:
            with progress_bar("reading", len(ids), unit="tokens") as bar:
                tokens_read = torch.tensor([ids], device=place)
                reading = prefill(model, tokens_read, reading and reading.state, bar.advance)
        typer.echo(text, nl=False)
        if tokenizer is None and text:
            typer.echo(" ", nl=False)
        steps: list[GeneratedToken] = []

        def tokens() -> Iterator[int]:
            generator, end = torch.Generator().manual_seed(seed), None if tokenizer is None else tokenizer.eos_id
            for step in run(model, reading, max_tokens=max_tokens, sampling=sampling, generator=generator, end=end):
                steps[:] = [step]
                yield int(step.token)

        for piece in decode_stream(tokens(), tokenizer):
            typer.echo(piece, nl=False)
            sys.stdout.flush()
            if folder is None and context.obj["console"].is_unread:
                return
        typer.echo("")
        if folder is not None:
            if steps:
                reading = prefill(model, steps[-1].token[:, None], steps[-1].state)
            write_state(reading, loaded, folder)


def _standard_input() -> str:
    """Read all of standard input as it is, line ends included.

    Raises:
        DataError: If it is not UTF-8.
    """
    content = sys.stdin.buffer.read()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        message = f"standard input is not UTF-8 text (byte {content[error.start]:#x} at offset {error.start})"
        raise DataError(message, "convert it first, as with iconv") from None
