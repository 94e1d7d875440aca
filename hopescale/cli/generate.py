"""`hopescale generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder (its latest checkpoint) or a checkpoint folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue; `-` reads standard input.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Choose among so many likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among tokens that reach this probability.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the choice.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Continue a prompt, token by token, from the state a model carries."""
    import torch

    from hopescale.infer.generate import generate as run
    from hopescale.infer.load import load_model
    from hopescale.infer.sampling import Sampling
    from hopescale.infer.text import decode_stream, encode_prompt
    from hopescale.parallel.device import choose_device

    sampling = Sampling(temperature, top_k, top_p)
    loaded = load_model(checkpoint, choose_device(device, "--device"))
    text = sys.stdin.read() if prompt == "-" else prompt
    ids = encode_prompt(text, loaded.tokenizer, loaded.config.model.vocab_size)
    steps = run(
        loaded.model,
        torch.tensor([ids], device=next(loaded.model.parameters()).device),
        max_tokens=max_tokens,
        sampling=sampling,
        generator=torch.Generator().manual_seed(seed),
        end=None if loaded.tokenizer is None else loaded.tokenizer.eos_id,
    )
    typer.echo(text, nl=False)
    if loaded.tokenizer is None:
        typer.echo(" ", nl=False)
    for piece in decode_stream((int(step.token) for step in steps), loaded.tokenizer):
        typer.echo(piece, nl=False)
        sys.stdout.flush()
    typer.echo("")
