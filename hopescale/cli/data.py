"""`hopescale data`: from a person's own text to shards a run can read, and a look into them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from hopescale.cli.options import read_count
from hopescale.cli.progress import Bar, progress_bar
from hopescale.common.children import threads_each
from hopescale.common.object_store import is_address
from hopescale.common.units import format_bytes, plural

if TYPE_CHECKING:
    from hopescale.data.dataset import TokenStream
    from hopescale.data.records import Document
    from hopescale.data.text import TextSource
    from hopescale.data.tokenizer import Tokenizer

app = typer.Typer(help="Train a tokenizer, prepare text, look into shards, check them.", no_args_is_help=True)

Inputs = Annotated[
    list[str], typer.Argument(metavar="INPUT...", help="Files, folders, addresses (s3:, hub:OWNER/NAME).")
]
Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="A prepared data set, in a folder or at an address.")]
Out = Annotated[Path, typer.Option(metavar="FOLDER", help="Folder to create.")]
TextKey = Annotated[str, typer.Option(metavar="KEY", help="Key or column of the text in JSON and tables.")]
Template = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Text made of several keys, as '{title}\\n\\n{body}'.")
]
Pattern = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="Files of a folder to read, as '*.py'; can be repeated.")
]
Exclude = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="Files of a folder to leave out; can be repeated.")
]
SkipUndecodable = Annotated[
    bool, typer.Option("--skip-undecodable", help="Leave out files and lines that are not UTF-8, and name them.")
]
Separator = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Where to cut plain files into documents, as '\\n\\n'.")
]


@app.command("tokenizer")
def train_tokenizer(
    inputs: Inputs,
    out: Out,
    vocab_size: Annotated[str, typer.Option(metavar="COUNT", help="Number of pieces.")] = "32k",
    kind: Annotated[
        str, typer.Option(metavar="KIND", help="sentencepiece (pieces of characters) or byte-bpe (as GPT-2 and Qwen).")
    ] = "sentencepiece",
    sample: Annotated[str, typer.Option(metavar="BYTES", help="Text to learn from, drawn at random.")] = "8M",
    text_key: TextKey = "text",
    template: Template = None,
    pattern: Pattern = None,
    separator: Separator = None,
    exclude: Exclude = None,
    skip_undecodable: SkipUndecodable = False,
) -> None:
    """Train a tokenizer on a sample of the text."""
    num_pieces, sample_bytes = read_count("--vocab-size", vocab_size), read_count("--sample", sample)
    from hopescale.data import train_tokenizer as training

    if kind not in get_args(training.Kind):
        raise typer.BadParameter(f"{kind!r} is not one of {', '.join(get_args(training.Kind))}", param_hint="--kind")
    source, left_out = _source(inputs, text_key, template, pattern, separator, exclude, skip_undecodable)
    with progress_bar("reading", _size(source)) as bar:
        documents = _then(replace(source, on_read=bar.advance).documents(shuffle_seed=0), bar)
        done = training.train_tokenizer(documents, out, vocab_size=num_pieces, sample_bytes=sample_bytes, kind=kind)
    _echo_left_out(left_out)
    typer.echo(
        f"{out}: {done.vocab_size:,} pieces, {done.bytes_per_token:.2f} bytes per token, "
        f"learned from {format_bytes(done.sample_bytes)} of {format_bytes(done.read_bytes)} read"
    )


@app.command()
def prepare(
    inputs: Inputs,
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Folder or address (s3://bucket/data) to create.")],
    tokenizer: Annotated[
        Path, typer.Option(metavar="PATH", help="Folder of a tokenizer or of a model, .model or tokenizer.json.")
    ],
    end_of_text: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="Token of a tokenizer.json that ends every document.")
    ] = None,
    split_special_tokens: Annotated[
        bool | None,
        typer.Option(
            "--split-special-tokens/--keep-special-tokens",
            help="Whether special tokens that a text spells out are text, or the tokens themselves.",
        ),
    ] = None,
    validation: Annotated[float, typer.Option(min=0, max=0.99, help="Fraction of documents to hold out.")] = 0.01,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the shuffle and of the held-out choice.")] = 0,
    shard_size: Annotated[str, typer.Option(metavar="BYTES", help="Size of a file, about.")] = "256Mi",
    text_key: TextKey = "text",
    template: Template = None,
    pattern: Pattern = None,
    separator: Separator = None,
    exclude: Exclude = None,
    skip_undecodable: SkipUndecodable = False,
) -> None:
    """Turn text into shuffled shards of tokens."""
    shard_bytes = read_count("--shard-size", shard_size)
    from hopescale.data import prepare as preparing
    from hopescale.data.dataset import PreparedData
    from hopescale.data.load_tokenizer import load_tokenizer
    from hopescale.data.storage import publish, require_free
    from hopescale.data.tokenizer_losses import RoundTrip

    source, left_out = _source(inputs, text_key, template, pattern, separator, exclude, skip_undecodable)
    pieces = load_tokenizer(tokenizer, end_of_text=end_of_text, split_special_tokens=split_special_tokens)
    round_trip = RoundTrip(pieces)
    if is_address(out):
        require_free(out)
    if lost := pieces.losses():
        hint = "a model trained on them can never write these; `hopescale data tokenizer` trains one that keeps all"
        typer.echo(f"warning: tokenizer {tokenizer} loses {', '.join(lost)}: {hint}", err=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="hopescale-"))) / "data" if is_address(out) else out
        bar = stack.enter_context(progress_bar("reading", _size(source)))
        preparing.prepare(
            _then(replace(source, on_read=bar.advance).documents(), bar),
            pieces,
            folder,
            validation=validation,
            seed=seed,
            shard_bytes=shard_bytes,
            num_threads=threads_each(1),
            progress=lambda documents, size: bar.note(f"{documents:,} documents"),
            on_written=bar.advance_of,
            round_trip=round_trip,
        )
        if is_address(out):
            publish(folder, out)
    _echo_left_out(left_out)
    typer.echo(f"{out}:")
    _echo_tokenizer(pieces)
    typer.echo(f"  round trip  {round_trip.sentence()}")
    _echo_splits(PreparedData(out).splits.values())


@app.command()
def inspect(
    folder: Folder,
    split: Annotated[str, typer.Option(metavar="NAME", help="train or validation.")] = "train",
    documents: Annotated[int, typer.Option(min=0, help="Documents to show.")] = 2,
    window: Annotated[int | None, typer.Option(min=0, help="Packed window to show instead.")] = None,
    seq_len: Annotated[int, typer.Option(min=1, help="Tokens of that window.")] = 1024,
    characters: Annotated[int, typer.Option(min=1, help="Characters to show of each text.")] = 400,
) -> None:
    """Show the sizes of a data set, and a few of its texts."""
    from hopescale.data import inspect as look
    from hopescale.data.dataset import PreparedData
    from hopescale.data.shards import SPLITS

    if split not in SPLITS:
        raise typer.BadParameter(f"{split!r} is not one of {', '.join(SPLITS)}", param_hint="--split")
    data = PreparedData(folder)
    typer.echo(f"{folder}: seed {data.index.seed}, {data.index.validation:g} held out")
    _echo_splits(data.splits.values())
    _echo_tokenizer(data.tokenizer)
    if window is not None:
        for number, text in enumerate(look.window_texts(data, split, window, seq_len)):
            _echo_text(f"{split} window {window}, its document {number}", text, characters)
        return
    for number, (num_tokens, text) in enumerate(look.first_documents(data, split, documents)):
        _echo_text(f"{split} document {number}, {num_tokens:,} tokens", text, characters)


@app.command()
def verify(folder: Folder) -> None:
    """Recompute every checksum and read every block."""
    from hopescale.data import inspect as look
    from hopescale.data.shards import Index
    from hopescale.data.storage import open_storage

    splits = Index.read(open_storage(folder).small_files).splits
    size = sum(entry.num_bytes for split in splits.values() for entry in split)
    with progress_bar("checking", size) as bar:
        index = look.verify(folder, on_shard=bar.note, on_checked=bar.advance)
    entries = [entry for split in index.splits.values() for entry in split]
    size = sum(entry.num_bytes for entry in entries)
    typer.echo(f"{folder}: {plural(len(entries), 'shard')}, {format_bytes(size)}, all as the index says")


def _source(
    inputs: list[str],
    text_key: str,
    template: str | None,
    pattern: list[str] | None,
    separator: str | None,
    exclude: list[str] | None,
    skip_undecodable: bool,
) -> tuple[TextSource, list[str]]:
    """Return the source of the text, and a list that receives the names of files and lines that are left out."""
    from hopescale.data.text import TextSource

    left_out: list[str] = []
    source = TextSource(
        tuple(inputs),
        text_key,
        tuple(pattern or ()),
        separator and _unescaped(separator),
        tuple(exclude or ()),
        template if template is None else _unescaped(template),
        on_undecodable=left_out.append if skip_undecodable else None,
    )
    return source, left_out


def _unescaped(text: str) -> str:
    return text.replace("\\r", "\r").replace("\\n", "\n").replace("\\t", "\t")


def _echo_left_out(names: list[str]) -> None:
    if names:
        typer.echo("\n  ".join([f"left out, as not UTF-8: {len(names):,}", *names]), err=True)


def _size(source: TextSource) -> int | None:
    """Add up the bytes to read; None if they are not known."""
    sizes = [file.size for file in source.files()]
    return sum(sizes) if all(sizes) else None


def _then(documents: Iterator[Document], bar: Bar) -> Iterator[Document]:
    """Give documents, and let the bar begin anew when no more are read."""
    try:
        yield from documents
    finally:
        bar.begin("writing", None)


def _echo_tokenizer(tokenizer: Tokenizer) -> None:
    end = f"end of text is {tokenizer.eos_id} {tokenizer.eos_token} (by {tokenizer.eos_origin})"
    print_of = tokenizer.fingerprint[:12]
    typer.echo(f"  tokenizer   {tokenizer.kind}, {tokenizer.vocab_size:,} pieces, {end}, {print_of}")


def _echo_splits(splits: Iterable[TokenStream]) -> None:
    for split in splits:
        if not split.num_tokens:
            typer.echo(f"  {split.split:<11} empty")
            continue
        typer.echo(
            f"  {split.split:<11} {split.num_documents:,} documents, {split.num_tokens:,} tokens, "
            f"{split.bytes_per_token:.2f} bytes per token, shards: {split.num_shards:,}"
        )


def _echo_text(title: str, text: str, characters: int) -> None:
    rest = len(text) - characters
    more = f"\n[{rest:,} more characters]" if rest > 0 else ""
    typer.echo(f"--- {title}\n{text[:characters]}{more}")
