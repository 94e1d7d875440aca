"""`hopescale convert`: checkpoints to folders of Hugging Face transformers, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hopescale.cli.counts import read_count
from hopescale.common.errors import ConfigError
from hopescale.common.units import format_bytes

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
    verify: Check = True,
) -> None:
    """Write a checkpoint as a folder that transformers loads without hopescale."""
    shard_bytes = read_count("--shard-size", shard_size)
    _require_extra()
    from hopescale.convert.hf import export, num_bytes

    exported = export(checkpoint, out, shard_bytes=shard_bytes)
    size = sum(map(num_bytes, exported.tensors.values()))
    shards = sum(name.endswith(".safetensors") for name in exported.files)
    typer.echo(f"{out}: step {exported.step}, {len(exported.tensors)} tensors, {format_bytes(size)} in {shards} files")
    if verify:
        _verify(out, checkpoint)


@app.command("from-hf")
def from_hf(folder: HfFolder, out: Out, verify: Check = True) -> None:
    """Write a folder made by `to-hf` as a checkpoint again."""
    _require_extra()
    from hopescale.convert.hf import restore_export

    typer.echo(f"{restore_export(folder, out)}: weights alone; train on with --reset-optimizer")
    if verify:
        _verify(folder, out)


@app.command("verify")
def verify_(folder: HfFolder, checkpoint: Checkpoint) -> None:
    """Compare a folder with a checkpoint: logits on held-out text, and generated tokens."""
    _require_extra()
    _verify(folder, checkpoint)


def _verify(folder: Path, checkpoint: Path) -> None:
    from hopescale.convert.verify import verify_folder

    for line in verify_folder(folder, checkpoint).lines():
        typer.echo(line)


def _require_extra() -> None:
    """Say at once what is missing, rather than after minutes of work."""
    from importlib.util import find_spec

    missing = [name for name in ("transformers", "safetensors", "tokenizers") if find_spec(name) is None]
    if missing:
        raise ConfigError(f"convert needs {', '.join(missing)}", "pip install 'hopescale[convert]'")
