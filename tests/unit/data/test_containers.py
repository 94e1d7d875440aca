"""One text in many containers: known by what they hold, they give the same documents."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from hopescale.common.errors import ConfigError, DataError
from hopescale.data.prepare import prepare
from hopescale.data.text import TextSource
from hopescale.data.tokenizer import Tokenizer

TEXTS = ["one\nline", 'a "quoted", text;\twith tabs', "naïve 漢字 🙂", "{braces} [and] more", "  spaces  ", "x,y\r\nz"]
ROWS = [{"id": number, "text": text, "title": f"t{number}"} for number, text in enumerate(TEXTS)]


def _csv(delimiter: str) -> bytes:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["id", "text", "title"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return stream.getvalue().encode()


def _parquet() -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), stream, row_group_size=2)
    return stream.getvalue()


def _arrow(kind: Callable) -> bytes:
    stream, table = io.BytesIO(), pyarrow.Table.from_pylist(ROWS)
    with kind(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return stream.getvalue()


def _tar(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


CONTAINERS = {
    "text": "\x1e".join(TEXTS).encode(),
    "json": json.dumps(ROWS, indent=1).encode(),
    "json-object": b"\xef\xbb\xbf" + json.dumps({"version": 1, "rows": ROWS}).encode(),
    "json-lines": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "csv": _csv(","),
    "tsv": b"\xef\xbb\xbf" + _csv("\t"),
    "parquet": _parquet(),
    "arrow-file": _arrow(pyarrow.ipc.new_file),
    "arrow-stream": _arrow(pyarrow.ipc.new_stream),
    "tar": _tar({".hidden": b"no", **{f"./d/{n}": text.encode() for n, text in enumerate(TEXTS)}}),
    "tar-of-parquet": _tar({"part": _parquet()}),
}


def _zstd(content: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(content)


COMPRESSIONS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": _zstd}


def read(*inputs: Path | str, **options) -> list[str]:
    return [document.text for document in TextSource(tuple(map(str, inputs)), **options).documents()]


@pytest.mark.parametrize("kind", CONTAINERS)
def test_the_same_text_in_every_container_and_compression(kind: str, tmp_path: Path) -> None:
    content = CONTAINERS[kind]
    (tmp_path / "plain").write_bytes(content)  # the name says nothing
    assert read(tmp_path / "plain", separator="\x1e") == TEXTS
    for name, compress in COMPRESSIONS.items():
        (tmp_path / name).write_bytes(compress(content))
        assert read(tmp_path / name, separator="\x1e") == TEXTS


def test_prepared_bytes_do_not_depend_on_the_container(tokenizer: Tokenizer, tmp_path: Path) -> None:
    prepared = {}
    for kind in ("text", "json", "json-lines", "csv", "parquet", "tar"):
        (tmp_path / kind).write_bytes(CONTAINERS[kind])
        source = TextSource((str(tmp_path / kind),), separator="\x1e")
        prepare(source.documents(), tokenizer, tmp_path / f"{kind}-data", validation=0.2)
        prepared[kind] = {file.name: file.read_bytes() for file in (tmp_path / f"{kind}-data").iterdir()}
    assert all(files == prepared["text"] for files in prepared.values())
    assert len(prepared["text"]) == 4


@pytest.mark.parametrize("kind", ["json", "json-lines", "csv", "parquet", "arrow-stream", "tar-of-parquet"])
def test_a_template_puts_columns_together(kind: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(CONTAINERS[kind])
    expected = [f"# t{n} ({n})\n{{{text}}}" for n, text in enumerate(TEXTS)]
    assert read(tmp_path, template="# {title} ({id})\n{{{text}}}") == expected
    assert read(tmp_path, text_key="title") == [f"t{n}" for n in range(len(TEXTS))]


@pytest.mark.parametrize(
    ("template", "message"),
    [("{title", "expected '}'"), ("no key", "names no key"), ("{a:>3}", "more than keys"), ("{}", "more than keys")],
)
def test_a_template_that_is_none_is_refused(tmp_path: Path, template: str, message: str) -> None:
    (tmp_path / "a").write_bytes(CONTAINERS["json-lines"])
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, template=template)


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a", CONTAINERS["parquet"], {"text_key": "body"}, "a: no column 'body'; the table has 'id', 'text', 'title'"),
        ("a", CONTAINERS["arrow-stream"], {"template": "{x}{text}"}, "a: no column 'x'; the table has"),
        ("a.jsonl", b'{"text": "x"}\n', {"template": "{x}"}, "a.jsonl:1: no text under the key 'x'"),
        ("a.jsonl", b'{"x": ["y"]}\n', {"template": "{x}"}, "a.jsonl:1: 'x' holds a list, which a template"),
        ("a", b'[{"text": "x"}, {"text": 5}]', {}, "a:2: no text under the key 'text'; the record has 5 there"),
        ("a", b"id,text\n1,x\n2,y,z\n", {}, "a:3: a row of 3 cells in a table of 2 columns"),
        ("a", b'id,text\n1,"x"y\n', {}, "a:2: not a row of the table"),
        ("a", b"id,text\n1,caf\xe9\n", {}, "a:2: not UTF-8 text"),
        ("a", CONTAINERS["parquet"][:-9], {}, "a: a damaged Parquet table"),
        ("a", CONTAINERS["tar"][:1500], {}, "cannot read .*a: the archive ends before its end mark"),
        ("a", CONTAINERS["tar"][:1027], {}, "cannot read .*a: "),
    ],
)
def test_what_is_wrong_with_a_record_is_named(tmp_path: Path, name, content, options, message) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path, **options)


def test_rows_that_are_empty_or_no_text_are_left_out(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([{"text": None}, {"text": " "}, {"text": "x"}])
    parquet.write_table(table, tmp_path / "a")
    (tmp_path / "b").write_bytes(b"id,text\n1,caf\xe9\n2,y\n\n3,\n")
    left_out: list[str] = []
    assert read(tmp_path, on_undecodable=left_out.append) == ["x", "y"]
    assert [Path(name).name for name in left_out] == ["b:2"]
    assert read(tmp_path / "a", template="({text})") == ["()", "( )", "(x)"]


def test_files_of_an_archive_are_left_out_by_name(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(_tar({"x.py": b"x", "y.md": b"y", "z/w.py": b"w"}))
    assert read(tmp_path, exclude=("*.md",)) == ["x", "w"]


def test_a_folder_saved_by_datasets_is_its_rows(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    assert read(tmp_path / "one") == TEXTS
    datasets.DatasetDict(train=rows, test=rows.select(range(2))).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "both") == TEXTS[:2] + TEXTS
    assert read(tmp_path / "both", patterns=("train/*",), template="{title}")[0] == "t0"


def test_a_data_set_of_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or iter(ROWS))
    assert read("hub:owner/name/part:test", template="{title}")[:2] == ["t0", "t1"]
    assert read("hub:owner/name") == TEXTS
    first = (("owner/name", "part"), {"split": "test", "streaming": True})
    assert asked == [first, (("owner/name", None), {"split": "train", "streaming": True})]
    with pytest.raises(DataError, match="hub:name is no data set of the hub"):
        read("hub:name")


def test_bytes_read_add_up_to_the_files(tmp_path: Path) -> None:
    for kind, content in CONTAINERS.items():
        (tmp_path / kind).write_bytes(gzip.compress(content) if kind == "csv" else content)
    told: list[int] = []
    source = TextSource((str(tmp_path),), on_read=told.append)
    size = sum(file.size for file in source.files())
    assert size == sum(path.stat().st_size for path in tmp_path.iterdir())
    for _ in source.documents():
        pass
    assert size <= sum(told) < 1.5 * size  # a table's end is read first, and may be read again
