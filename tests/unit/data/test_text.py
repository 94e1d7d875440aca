from __future__ import annotations

import bz2
import gzip
import json
import os
import sys
from pathlib import Path

import fsspec
import pytest

from hopescale.common.errors import DataError
from hopescale.data.inputs import find_files
from hopescale.data.records import Document
from hopescale.data.text import TextSource


def read(*inputs: Path | str, **options) -> list[Document]:
    return list(TextSource(tuple(map(str, inputs)), **options).documents())


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_plain_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_bytes("def f():\r\n\treturn 'é'\n\n".encode())
    assert read(path) == [Document("def f():\r\n\treturn 'é'\n\n", str(path))]


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "line"}\n')
    assert [d.text for d in read(tmp_path)] == ["hello", "line"]


def test_a_separator_cuts_plain_files_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\n\n\nthree")
    write_lines(tmp_path / "b.jsonl", {"text": "four\n\nfive"})
    assert [d.text for d in read(tmp_path, separator="\n\n")] == ["one", "two", "three", "four\n\nfive"]


def test_json_lines_give_a_document_each_and_name_their_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"body": "one"}, {"body": "  "}, {"body": "two"})
    path.write_text(path.read_text() + "\n")
    assert read(path, text_key="body") == [Document("one", f"{path}:1"), Document("two", f"{path}:3")]


@pytest.mark.parametrize("name", ["c4.json.gz", "c4.json", "part-0", "x.txt"])
def test_json_lines_are_known_by_what_they_hold(tmp_path: Path, name: str) -> None:
    lines = b'{"text": "one", "url": "a"}\n{"text": "two"}\n'
    (tmp_path / name).write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
    assert [d.text for d in read(tmp_path)] == ["one", "two"]


def test_json_that_holds_no_texts_stays_a_text(tmp_path: Path) -> None:
    for name, content in {"b.json": '{"name": "x"}\n', "c.json": "[1]\n[2]\n", "d.py": "[\n 1]"}.items():
        (tmp_path / name).write_text(content)
    assert [d.text for d in read(tmp_path)] == ['{"name": "x"}\n', "[1]\n[2]\n", "[\n 1]"]
    write_lines(tmp_path / "e.json", {"content": "x"}, {"content": "y"})
    with pytest.raises(DataError, match="e.json:1: no text under the key 'text'; the line has the keys 'content'"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", b"body,id\nx,1\n", "a.csv: a comma-separated table without a column 'text'; .* 'body,id'"),
        ("a.tsv.gz", gzip.compress(b"body\tid\n"), "a.tsv.gz: a tab-separated table without a column 'text'"),
        ("a.parquet", b"PAR1\x15\x04", "a.parquet: a damaged Parquet table"),
        ("a", b"\xff\xff\xff\xff\x10\0\0\0", "a: a damaged Arrow table"),
        ("a", b"PK\x03\x04....", "a: an archive of several files, not a text"),
        ("a", b"%PDF-1.7\n", "a: a PDF, not a text"),
    ],
    ids=["csv", "tsv", "parquet", "arrow", "zip", "pdf"],
)
def test_files_that_are_no_texts_are_named(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected):
        read(tmp_path)


def test_a_separator_of_line_ends_cuts_files_of_windows_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\r\nand\r\n\r\ntwo")
    (tmp_path / "b.txt").write_bytes(b"three\n\nfour\r\n\r\nfive")
    expected = ["one\r\nand", "two", "three", "four\r\n\r\nfive"]
    assert [d.text for d in read(tmp_path, separator="\n\n")] == expected
    assert [d.text for d in read(tmp_path / "a.txt", separator="\r\n\r\n")] == expected[:2]


def test_linked_files_and_folders_are_read_once(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    (elsewhere / "deep").mkdir(parents=True)
    folder.mkdir()
    (elsewhere / "deep" / "b.txt").write_text("linked")
    (folder / "m.txt").write_text("own")
    (folder / "a.txt").symlink_to(folder / "m.txt")
    (folder / "link").symlink_to(elsewhere)
    (folder / "same").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    (folder / "z.txt").symlink_to(elsewhere / "deep" / "b.txt")
    assert read(folder) == [
        Document("linked", str(folder / "link" / "deep" / "b.txt")),
        Document("own", str(folder / "m.txt")),
    ]
    assert [file.size for file in find_files(str(folder), (), ())] == [6, 3]
    # a name that is left out keeps no other from being read, as in the caches of the hub
    assert [d.text for d in read(folder, patterns=("[az].txt",))] == ["own", "linked"]


def test_links_to_nothing_are_named_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("own")
    for name in ("b.txt", "c.txt"):
        (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"holds links to files that do not exist: b.txt, c.txt") as caught:
        find_files(str(tmp_path), (), ())
    assert "--exclude" in caught.value.hint
    for name in ("dataset_info.json", "state.json"):  # as of a folder that datasets has saved
        (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"b.txt, c.txt, dataset_info.json, state.json"):
        find_files(str(tmp_path), (), ())
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).unlink()
    assert [d.text for d in read(tmp_path, exclude=("[bc].txt",))] == ["own"]


def test_a_pipe_in_a_folder_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "link").symlink_to(tmp_path / "pipe")
    for folder, name in ((tmp_path, "pipe"), (tmp_path / "text", "link")):
        with pytest.raises(DataError, match=f"{name} is neither a file nor a folder"):
            read(folder)


def test_compressed_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    (tmp_path / "b.txt.bz2").write_bytes(bz2.compress(b"three"))
    assert [d.text for d in read(tmp_path)] == ["one", "two", "three"]


def test_remote_addresses_are_read() -> None:
    memory = fsspec.filesystem("memory")
    with memory.open("/bucket/docs/a.txt", "wb") as file:
        file.write(b"far")
    with memory.open("/bucket/docs/b.jsonl.gz", "wb") as file:
        file.write(gzip.compress(b'{"text": "away"}\n'))
    assert [d.text for d in read("memory://bucket/docs")] == ["far", "away"]
    assert [d.text for d in read("memory://bucket/docs/a.txt")] == ["far"]


def test_folders_are_read_sorted_and_filtered(tmp_path: Path) -> None:
    for name in ("z.py", "b/x.md", "b/a.py", ".git/config", "b/.hidden.py", "a.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [d.text for d in read(tmp_path)] == ["a.bin", "b/a.py", "b/x.md", "z.py"]
    assert [d.text for d in read(tmp_path, patterns=("*.py",))] == ["b/a.py", "z.py"]
    assert [d.text for d in read(tmp_path, patterns=("b/*", "*.bin"))] == ["a.bin", "b/a.py", "b/x.md"]
    assert [d.text for d in read(tmp_path / "z.py", tmp_path / "b", patterns=("*.md",))] == ["z.py", "b/x.md"]


def test_shuffling_files_is_seeded_and_loses_none(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02d}.txt").write_text(str(number))
    source = TextSource((str(tmp_path),))
    orders = [[d.text for d in source.documents(shuffle_seed=seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2], key=int) == [str(number) for number in range(20)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"text": "ok"}\n{"text": ', "a.jsonl:2: not valid JSON"),
        ('{"text": "ok"}\n{"body": "x", "id": 1}', "a.jsonl:2: no text under the key 'text'.*'body', 'id'"),
        ('{"text": "ok"}\n{"text": 5}', "a.jsonl:2: no text under the key"),
        ('{"text": "ok"}\n["x"]', "a.jsonl:2: no text under the key 'text'; the line has no object"),
        ('{"text": "\\ud800"}', "a.jsonl:1: half a surrogate pair"),
        ("[" * 100_000, "a.jsonl:1: not valid JSON"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(DataError, match=expected):
        read(tmp_path)


def test_all_files_that_are_no_text_are_named_at_once_or_left_out(tmp_path: Path) -> None:
    for name, content in {"a.txt": b"\xff", "b.txt": b"good", "c.txt": b"caf\xe9"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "x"}\n{"text": "\xe9"}\n{"text": "\\ud800"}\n{"text": "y"}\n')
    with pytest.raises(DataError, match=r"(?s)a.txt: not .*c.txt: not .* offset 3\).*d.jsonl:2: not") as caught:
        read(tmp_path)
    assert "--exclude" in caught.value.hint and "--skip-undecodable" in caught.value.hint
    left_out: list[str] = []
    assert [d.text for d in read(tmp_path, on_undecodable=left_out.append)] == ["good", "x", "y"]
    assert [Path(name).name for name in left_out] == ["a.txt", "c.txt", "d.jsonl:2", "d.jsonl:3"]
    assert [d.text for d in read(tmp_path, exclude=("[ac].*", "d.jsonl"))] == ["good"]
    with pytest.raises(DataError, match="all 4 files are left out by --exclude"):
        read(tmp_path, exclude=("*",))


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(b"ab\xff\xfe")
    with pytest.raises(DataError, match=r"photo.png: not UTF-8 text \(byte 0xff at offset 2\)") as caught:
        read(tmp_path)
    assert "--pattern" in caught.value.hint


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="input .*nowhere.txt does not exist"):
        read(tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match="cannot read nosuch://x"):
        read("nosuch://x")


def test_a_folder_without_a_match_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no files"):
        read(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"1 files, none matches \*.py or \*.md"):
        read(tmp_path, patterns=("*.py", "*.md"))


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-10], lambda data: b"junk", lambda data: data[:20] + b"\xff" * 9]
)
def test_a_damaged_archive_is_named(tmp_path: Path, damage) -> None:
    whole = gzip.compress("".join(f'{{"text": "{number}"}}\n' for number in range(1000)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(damage(whole))
    with pytest.raises(DataError, match="a.jsonl.gz"):
        read(tmp_path)


def test_zstandard_is_read_in_frames_and_a_cut_is_named(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    lines = b'{"text": "one"}\n' + b"\n" * 500_000, b'{"text": "two"}\n'
    whole = b"".join(zstandard.ZstdCompressor().compress(part) for part in lines)
    (tmp_path / "a.jsonl.zst").write_bytes(whole)
    (tmp_path / "b").write_bytes(zstandard.ZstdCompressor().compress(b"three"))
    assert [d.text for d in read(tmp_path)] == ["one", "two", "three"]
    for damaged in (whole[:-5], whole[:40] + b"junk" + whole[44:], whole + b"junk"):
        (tmp_path / "a.jsonl.zst").write_bytes(damaged)
        with pytest.raises(DataError, match="a.jsonl.zst: .*(ends before|damaged)"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        ("zstandard", "a.jsonl.zst", "a.jsonl.zst: compressed by Zstandard, which needs the package zstandard"),
        ("s3fs", "s3://bucket/a", "(?s)cannot read s3://bucket/a: Install s3fs.*hopescale.s3."),
        ("datasets", "hub:a/b", "(?s)hub:a/b: a data set of the hub, which needs .* datasets.*hopescale.datasets."),
        ("pyarrow", "a.parquet", "(?s)a.parquet: a Parquet table, which needs .* pyarrow.*hopescale.parquet."),
        ("gcsfs", "gs://bucket/a", "cannot read gs://bucket/a: .*gcsfs"),
    ],
)
def test_a_package_that_is_missing_is_named(tmp_path: Path, monkeypatch, module: str, name: str, message: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd....")
    (tmp_path / "a.parquet").write_bytes(b"PAR1....PAR1")
    with pytest.raises(DataError, match=message):
        read(name if ":" in name else tmp_path / name)


@pytest.mark.parametrize("name", ["texts.zip", "texts.tar.gz", "texts.TAR"])
def test_an_archive_is_refused_rather_than_read_in_part(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"PK")
    with pytest.raises(DataError, match=f"{name}: an archive of several files"):
        read(path)
