"""The way from a person's own text to shards, as they type it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from typer.testing import CliRunner, Result

from hopescale.cli.data import app
from hopescale.common.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*args: object) -> Result:
    return CliRunner().invoke(app, list(map(str, args)))


def succeed(*args: object) -> str:
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of mixed text: Python files, a note, JSON lines."""
    folder = tmp_path_factory.mktemp("notes")
    for path in sorted((REPOSITORY / "hopescale" / "data").glob("*.py")):
        (folder / path.name).write_text(path.read_text())
    (folder / "note.md").write_text("# A note\n\n" + "The level learns slowly.\n" * 40)
    lines = [json.dumps({"text": f"line {number} of the log\n" * 5}) for number in range(30)]
    (folder / "log.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def tokenizer(notes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tok"
    said = succeed("tokenizer", notes, "--out", folder, "--vocab-size", "512", "--sample", "1M")
    assert re.search(r"tok: 512 pieces, \d\.\d\d bytes per token, learned from", said)
    return folder


@pytest.fixture
def data(notes: Path, tokenizer: Path, tmp_path: Path) -> Path:
    said = succeed("prepare", notes, "--out", tmp_path / "data", "--tokenizer", tokenizer, "--validation", "0.2")
    assert re.search(r"train +\d+ documents, [\d,]+ tokens, \d\.\d\d bytes per token, shards: 1", said)
    assert re.search(r"validation +\d+ documents", said)
    return tmp_path / "data"


def test_text_becomes_shards_that_can_be_looked_at_and_verified(data: Path) -> None:
    said = succeed("inspect", data, "--documents", "100")
    assert "line 3 of the log" in said and "512 pieces, end of text is 1" in said
    assert "The level learns slowly." in said + succeed("inspect", data, "--split", "validation", "--documents", "99")
    window = succeed("inspect", data, "--window", "0", "--seq-len", "600", "--characters", "50")
    assert "--- train window 0, its document 0" in window and "more characters]" in window
    assert "2 shards" in succeed("verify", data)


def test_patterns_and_separators_choose_documents(notes: Path, tokenizer: Path, tmp_path: Path) -> None:
    base = ("prepare", notes, "--tokenizer", tokenizer, "--validation", "0")
    python = succeed(*base, "--out", tmp_path / "a", "--pattern", "*.py")
    assert f"{len(list(notes.glob('*.py')))} documents" in python and "validation  empty" in python
    assert "3 documents" in succeed(
        *base, "--out", tmp_path / "b", "--pattern", "order.py", "--pattern", "n*.md", "--separator", "\\n\\nThe "
    )
    assert "2 documents" in succeed(*base, "--out", tmp_path / "c", "--pattern", "*.md", "--separator", "\\n\\n")
    (bad := tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    done = run(*base, bad, "--out", tmp_path / "d", "--exclude", "*.[jp]*", "--skip-undecodable")
    assert "1 documents" in done.stdout and f"left out, as not UTF-8: 1\n  {bad}" in done.stderr


def test_a_tokenizer_that_loses_line_ends_is_warned_of(notes: Path, tokenizer: Path, tmp_path: Path) -> None:
    lines = [line for line in (notes / "order.py").read_text().splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "m"), vocab_size=400, byte_fallback=True
    )
    base = ("prepare", notes, "--pattern", "order.py", "--validation", "0", "--out")
    said = run(*base, tmp_path / "a", "--tokenizer", tmp_path / "m.model").stderr
    assert "m.model loses line ends, tabs, runs of spaces" in said and "capital" not in said
    assert "warning" not in run(*base, tmp_path / "b", "--tokenizer", tokenizer).stderr


def fails_with(message: str, *args: object) -> DataError:
    result = run(*args)
    assert isinstance(result.exception, DataError), result.output
    assert re.search(message, str(result.exception)), str(result.exception)
    assert result.exception.exit_code == 3
    return result.exception


def test_a_missing_input(tokenizer: Path, tmp_path: Path) -> None:
    fails_with("nowhere does not exist", "tokenizer", tmp_path / "nowhere", "--out", tmp_path / "out")
    fails_with("nowhere", "prepare", tmp_path / "nowhere", "--out", tmp_path / "out", "--tokenizer", tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_missing_tokenizer(notes: Path, tmp_path: Path) -> None:
    error = fails_with(
        "cannot read tokenizer", "prepare", notes, "--out", tmp_path / "o", "--tokenizer", tmp_path / "t"
    )
    assert "hopescale data tokenizer" in error.hint


def test_a_folder_that_is_no_data_set(tmp_path: Path) -> None:
    for verb in ("inspect", "verify"):
        fails_with("cannot read .*index.json", verb, tmp_path)


def test_a_corrupt_shard(data: Path) -> None:
    shard = data / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    fails_with("1 of 2 shards .*\n.*train-000000.tar: SHA-256", "verify", data)
    os.truncate(shard, 1000)
    fails_with("train-000000.tar", "verify", data)
    fails_with("train-000000.tar .1,000 bytes", "inspect", data)


def test_an_output_that_exists_is_kept(data: Path, notes: Path, tokenizer: Path) -> None:
    before = (data / "index.json").read_bytes()
    fails_with("already exists", "prepare", notes, "--out", data, "--tokenizer", tokenizer)
    fails_with("already exists", "tokenizer", notes, "--out", tokenizer)
    assert (data / "index.json").read_bytes() == before


@pytest.mark.parametrize("option", [("--vocab-size", "many"), ("--sample", "0"), ("--sample", "1.5")])
def test_a_count_that_is_none_is_a_usage_error(notes: Path, tmp_path: Path, option: tuple[str, str]) -> None:
    result = run("tokenizer", notes, "--out", tmp_path / "tok", *option)
    assert result.exit_code == 2 and option[0] in result.output


def test_a_split_that_does_not_exist_is_a_usage_error(data: Path) -> None:
    assert run("inspect", data, "--split", "test").exit_code == 2


def test_looking_needs_no_torch(data: Path) -> None:
    code = (
        "import sys; from hopescale.cli.data import app\n"
        "try: app()\n"
        "except SystemExit as end: sys.exit('torch' in sys.modules or end.code)"
    )
    for verb in ("inspect", "verify"):
        subprocess.run([sys.executable, "-c", code, verb, str(data)], check=True, capture_output=True, timeout=60)


def test_a_real_write_limit_loses_nothing(notes: Path, tokenizer: Path, tmp_path: Path) -> None:
    """The operating system refuses to let a file grow, as a full disk does."""
    code = (
        "import resource, signal, sys; from hopescale.cli.data import app\n"
        "import webdataset\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "from hopescale.common.errors import DataError\n"
        "try: app(standalone_mode=False)\n"
        "except DataError as error: print(error); sys.exit(error.exit_code)"
    )
    (tmp_path / "precious.txt").write_text("keep me")
    args = ["prepare", str(notes), "--out", str(tmp_path / "data"), "--tokenizer", str(tokenizer)]
    done = subprocess.run([sys.executable, "-c", code, *args], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3 and "cannot write" in done.stdout and "File too large" in done.stdout
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_the_demo_corpus_is_deterministic_text(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        command = [sys.executable, str(REPOSITORY / "tools" / "stdlib_corpus.py"), str(tmp_path / name)]
        said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
        assert re.search(rf"{name}: [\d,]+ documents, \d+\.\d MB", said)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert all(record["text"].strip() for record in records)
    names = [record["source"] for record in records]
    assert {"argparse.py", "json/decoder.py", "help/for"} <= set(names) and len(set(names)) == len(names)
    assert not any("/test/" in name or "site-packages" in name for name in names)
