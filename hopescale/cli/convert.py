"""`hopescale convert`: checkpoints to folders of Hugging Face transformers, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hopescale.cli.options import Levels, echo_rows, read_count, require_packages
from hopescale.cli.progress import progress_bar
from hopescale.common.errors import ConfigError
from hopescale.common.units import format_bytes, plural

app = typer.Typer(help="Export for inference, start from pre-trained models, compare, describe.", no_args_is_help=True)

Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A run folder (its latest) or a checkpoint.")]
HfFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of Hugging Face transformers.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.")]
Check = Annotated[bool, typer.Option("--verify/--no-verify", help="Compare logits and generated tokens afterwards.")]


@app.command("to-hf")
def to_hf(
    checkpoint: Checkpoint,
    out: Out,
    shard_size: Annotated[str, typer.Option(metavar="BYTES", help="Size of a file of weights, at most.")] = "4Gi",
    native: Annotated[
        bool,
        typer.Option("--native", help="Write a Transformer as the Llama, Mistral or Qwen it equals."),
    ] = False,
    levels: Levels = None,
    verify: Check = True,
) -> None:
    """Write a checkpoint as a folder that transformers loads without hopescale."""
    shard_bytes = read_count("--shard-size", shard_size)
    _require_extra()
    from hopescale.convert.hf import export, num_bytes

    settings = {"shard_bytes": shard_bytes, "native": native, "levels": levels, "report": typer.echo}
    with progress_bar("writing") as bar:
        exported = export(checkpoint, out, **settings, on_written=bar.show)
    size = sum(map(num_bytes, exported.tensors.values()))
    files = plural(sum(name.endswith(".safetensors") for name in exported.files), "file")
    typer.echo(f"{out}: step {exported.step}, {len(exported.tensors)} tensors, {format_bytes(size)} in {files}")
    if verify:
        verify_(out, checkpoint, levels)


@app.command("from-hf")
def from_hf(
    folder: HfFolder,
    out: Out,
    as_: Annotated[
        str | None,
        typer.Option("--as", metavar="KIND", help="Stack a pre-trained model: hope-attention or transformer."),
    ] = None,
    levels: Annotated[
        str | None, typer.Option(metavar="NAME=PERIOD,...", help="Levels of --as hope-attention.")
    ] = None,
    stacking: Annotated[
        str | None, typer.Option(metavar="HOW", help="copy: every block gets all levels; depth: one each.")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="bf16 or fp32, with --as.", show_default="the source's")] = None,
    verify: Check = True,
) -> None:
    """Write a folder made by `to-hf` as a checkpoint again, or begin from a pre-trained Llama or Qwen (`--as`)."""
    periods = _levels(as_, levels, stacking, precision)
    _require_extra()
    if as_ is None:
        from hopescale.convert.hf import restore_export

        with progress_bar("reading") as bar:
            made = restore_export(folder, out, bar.show_part)
        typer.echo(f"{made}: weights alone; train on with --reset-optimizer")
    else:
        from hopescale.convert.stacking import stack

        with progress_bar("reading") as bar:
            made = stack(folder, out, periods, stacking or "copy", precision, typer.echo, bar.show_part)
        typer.echo(f"{made}: begin a run with it: hopescale train {out / 'config.yaml'} --init {out} ...")
    if verify:
        verify_(folder, out)


def _levels(as_: str | None, levels: str | None, stacking: str | None, precision: str | None) -> dict[str, int]:
    """Check the options of `from-hf` against each other; return the period of each level."""
    given = {"--levels": levels, "--stacking": stacking, "--precision": precision}
    allowed = {"--stacking": ("copy", "depth"), "--precision": ("bf16", "fp32")}
    if as_ not in (None, "hope-attention", "transformer"):
        raise ConfigError(f"--as is {as_}, but must be hope-attention or transformer")
    for name, value in given.items():
        if value is not None and as_ is None:
            raise ConfigError(f"{name} has no effect without --as", "name what the model becomes: --as hope-attention")
        if value is not None and value not in allowed.get(name, (value,)):
            raise ConfigError(f"{name} is {value}, but must be {' or '.join(allowed[name])}")
    if as_ == "transformer":
        if levels or stacking:
            raise ConfigError("--levels and --stacking have no effect with --as transformer, which has one level")
        return {"mlp": 1}
    if as_ is None:
        return {}
    if levels is None:
        raise ConfigError("--as hope-attention needs --levels", "as in --levels fast=1,mid=4,slow=16")
    pairs = [part.partition("=") for part in levels.split(",")]
    names = [name.strip() for name, _, _ in pairs]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ConfigError(f"--levels names {twice[0]} more than once")
    return {name: read_count("--levels", period) for name, (_, _, period) in zip(names, pairs, strict=True)}


@app.command()
def info(path: Annotated[Path, typer.Argument(help="Run, checkpoint, export or folder of transformers.")]) -> None:
    """Say what a folder is: sizes, layout, step, tokens, levels, optimizer."""
    _require_extra()
    from hopescale.convert.info import describe

    echo_rows(describe(path))


@app.command("verify")
def verify_(folder: HfFolder, checkpoint: Checkpoint, levels: Levels = None) -> None:
    """Compare a folder with a checkpoint: logits on held-out text, and generated tokens."""
    _require_extra()
    from hopescale.convert.verify import verify_folder

    with progress_bar("loading", unit="tokens") as bar:
        compared = verify_folder(folder, checkpoint, levels, bar.show_part)
    for line in compared.lines():
        typer.echo(line)


def _require_extra() -> None:
    require_packages("convert needs", "convert", "transformers", "safetensors")
