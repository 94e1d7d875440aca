from __future__ import annotations

import json
from pathlib import Path

import pytest

from hopescale.checkpoint.manifest import (
    FORMAT,
    FileEntry,
    Manifest,
    TensorEntry,
    checkpoint_folders,
    describe_file,
    file_problems,
    fingerprint,
    folder_name,
    read_manifest,
    read_pointer,
    step_of,
    to_json,
)
from hopescale.common.errors import CheckpointError


def test_a_manifest_returns_as_it_was_written(tmp_path: Path):
    manifest = Manifest(
        progress={"step": 7, "losses": [0.1, 1 / 3, 1e-308]},
        config={"levels": {"b": 1, "a": [1, 2]}, "none": None},
        identity={"model": "x"},
        versions={"torch": "2"},
        tensors={"w": TensorEntry((2, 3), "bfloat16"), "s": TensorEntry((), "int64")},
        files={"a": FileEntry(3, "00")},
    )
    (tmp_path / "manifest.json").write_text(to_json(manifest))
    assert read_manifest(tmp_path) == manifest
    assert read_manifest(tmp_path).step == 7
    assert list(read_manifest(tmp_path).config["levels"]) == ["b", "a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "not valid JSON"),
        (lambda text: text.replace('"step": 7', '"step": 8'), "does not match its checksum"),
        (lambda text: text.replace(f'"format": {FORMAT}', '"format": 99'), "has format 99"),
        (lambda text: "[]", "does not match its checksum"),
    ],
)
def test_a_changed_manifest_is_refused(tmp_path: Path, change, message: str):
    text = to_json(Manifest({"step": 7}, {}, {}))
    assert change(text) != text
    (tmp_path / "manifest.json").write_text(change(text))
    with pytest.raises(CheckpointError, match=message) as raised:
        read_manifest(tmp_path)
    assert raised.value.exit_code == 4


def test_a_folder_that_is_no_checkpoint(tmp_path: Path):
    with pytest.raises(CheckpointError, match="holds no manifest.json"):
        read_manifest(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_manifest(tmp_path / "nowhere")


def test_numbers_that_json_cannot_carry_are_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(Manifest({"step": 1, "loss": float("nan")}, {}, {}))


def test_file_problems(tmp_path: Path):
    for name in ("good", "short", "changed", "gone"):
        (tmp_path / name).write_bytes(b"0123")
    files = {path.name: describe_file(path) for path in tmp_path.iterdir()}
    (tmp_path / "short").write_bytes(b"012")
    (tmp_path / "changed").write_bytes(b"0124")
    (tmp_path / "gone").unlink()
    assert len(file_problems(tmp_path, files, digests=False)) == 2
    found = " ".join(file_problems(tmp_path, files, digests=True))
    assert "short has 3 bytes, the manifest says 4" in found
    assert "gone is missing" in found
    assert "changed has other content" in found
    assert "good" not in found


def test_names(tmp_path: Path):
    for name in ("step-00000002", "step-123456789", "step-00000010", "step-1", ".tmp-step-00000003", "step-0000002x"):
        (tmp_path / name).mkdir()
    assert folder_name(1200) == "step-00001200"
    assert [step_of(path) for path in checkpoint_folders(tmp_path)] == [2, 10, 123456789]
    assert checkpoint_folders(tmp_path / "nowhere") == []


@pytest.mark.parametrize("text", ["", "../elsewhere", "step-1", "\x00\xff"])
def test_a_pointer_that_names_no_checkpoint_is_none(tmp_path: Path, text: str):
    (tmp_path / "latest").write_bytes(text.encode("latin-1"))
    assert read_pointer(tmp_path) is None


def test_fingerprint_ignores_the_order_of_keys_only():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint(json.loads('{"b": 2, "a": 1}'))
    assert fingerprint({"a": 1}) != fingerprint({"a": 1.5})
    assert fingerprint([1, 2]) != fingerprint([2, 1])
