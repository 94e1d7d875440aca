"""`hopescale adapt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hopescale.cli.eval import load
from hopescale.cli.options import read_count
from hopescale.cli.progress import progress_bar
from hopescale.common.errors import CheckpointError
from hopescale.infer.adaptation import RATE, adaptation_of, read_adaptation

REPORT = "report.json"
"""All figures of a pass, beside its levels."""


def adapt(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A run folder, a checkpoint, or an export of `convert to-hf`.")
    ],
    stream: Annotated[str, typer.Argument(metavar="STREAM", help="Text to follow: a file, a folder or an address.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the levels are kept; an earlier pass goes on.")],
    levels: Annotated[
        str, typer.Option(metavar="NAME=TOKENS,...", help="Levels that follow.", show_default="update_every_tokens")
    ] = "",
    rate: Annotated[float | None, typer.Option(help="Learning rate of a step.", show_default=str(RATE))] = None,
    nested: Annotated[
        bool, typer.Option("--nested", help="Levels return to the trained weights when the next slower one steps.")
    ] = False,
    parts: Annotated[int, typer.Option(min=1, help="Parts of the stream that are asked for again later.")] = 8,
    probe: Annotated[int, typer.Option(min=1, help="Tokens of a part that are asked for again.")] = 512,
    save_every: Annotated[str, typer.Option(metavar="TOKENS", help="How often the levels are kept.")] = "64Ki",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Read a stream once while levels learn from it, and keep these levels apart from the weights.

    Exit codes: 0 done, 1 a loss that is no number, 2 options, 3 the stream, 4 model or levels.
    """
    every = read_count("--save-every", save_every)
    given = read_adaptation("--levels", levels, rate=rate, nested=nested) if levels else None
    from hopescale.evals.report import write_report
    from hopescale.infer.follow import StreamPass, has_pass, read_stream
    from hopescale.parallel.device import choose_device

    goes_on = has_pass(out)
    if not goes_on and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"output {out} exists, and holds no levels", "choose another folder: --out")
    loaded = load(checkpoint, choose_device(device, "--device"))
    adaptation = given or adaptation_of(loaded.config.model, rate=rate, nested=nested)
    adaptation.check(loaded.config.model)
    following = StreamPass(loaded, adaptation, read_stream(stream, loaded), parts=parts, probe_tokens=probe)
    if goes_on:
        following.go_on(out)
        typer.echo(f"goes on after {following.position:,} of {following.size:,} tokens", err=True)
    with progress_bar("following", unit="tokens") as bar:
        following.run(out, every, lambda line: typer.echo(line, err=True), bar.show)
    for line in following.table():
        typer.echo(line)
    write_report(out / REPORT, following.report())
    typer.echo(f"levels in {out}: hopescale generate {checkpoint} --levels {out}")
