"""Exports: what they hold, that nothing is lost on the way back, what they cost, and what is refused."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hopescale.checkpoint.load import read_tensors
from hopescale.checkpoint.manifest import read_manifest
from hopescale.common.errors import CheckpointError
from hopescale.convert.hf import (
    EXPORT,
    INDEX,
    SafetensorsFolder,
    export,
    restore_export,
    write_checkpoint,
)

ROOT = Path(__file__).parents[3]
SHARD = 20_000


def contents(checkpoint: Path) -> dict[str, torch.Tensor]:
    return read_tensors(checkpoint, read_manifest(checkpoint).tensors)


@pytest.mark.parametrize("overrides", [(), ("model.tie_embeddings=false",), ("model.cms.variant=independent",)])
def test_a_round_trip_keeps_every_bit(save, tmp_path: Path, overrides: tuple[str, ...]):
    checkpoint = save(*overrides)
    exported = export(checkpoint, tmp_path / "out", shard_bytes=SHARD)
    assert sum(name.endswith(".safetensors") for name in exported.files) > 2
    told: list[tuple[str, int, int]] = []
    again = restore_export(tmp_path / "out", tmp_path / "back", lambda *one: told.append(one))
    last = {verb: (done, total) for verb, done, total in told}
    assert list(last) == ["checking", "writing"] and all(done == total > 0 for done, total in last.values())
    before, after = contents(checkpoint), contents(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)
    old, new = read_manifest(checkpoint), read_manifest(again)
    assert (old.progress, old.config, old.identity) == (new.progress, new.config, new.identity)


def test_the_model_card_has_recipe_and_position(save, tmp_path: Path):
    export(save("train.steps=9"), tmp_path / "out", shard_bytes=SHARD)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Step 7 of 9, 672 tokens" in card
    assert "| slow | 16 | 4 |" in card and "synthetic: markov" in card and "update_every_steps: 4" in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hope"]["d_model"] == 32


MEASURE = """
import re, sys
from pathlib import Path
from hopescale.convert.hf import export

def value(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

source, out, shard = sys.argv[1:]
export(Path(source), Path(out + "-first"), shard_bytes=int(shard))
Path("/proc/self/clear_refs").write_text("5")
before = value("VmRSS")
export(Path(source), Path(out), shard_bytes=int(shard))
print(value("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory in /proc")
def test_an_export_needs_less_than_two_shards(save, tmp_path: Path):
    """Of a model of 4 shards, in a process that has exported a first time and so has loaded all it needs."""
    wide = (
        "model.d_model=768",
        "model.mixers.hope.kind=attention",
        "model.num_layers=4",
    )
    checkpoint = save(*wide, *(f"model.cms.levels.{name}.d_ff=512" for name in ("fast", "mid", "slow")))
    shard = sum(file.stat().st_size for file in checkpoint.glob("*.distcp")) // 4
    # Freed memory goes back to the system at once, so that the peak is what is in use.
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE, str(checkpoint), str(tmp_path / "out"), str(shard)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert shard / 2 < int(done.stdout) < 2 * shard


@pytest.fixture
def exported(save, tmp_path: Path) -> Path:
    export(save(), tmp_path / "out", shard_bytes=SHARD)
    return tmp_path / "out"


def refused(folder: Path, tmp_path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        restore_export(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    return caught.value.message


def test_a_changed_export_is_refused(exported: Path, tmp_path: Path):
    shard = sorted(exported.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert f"{shard.name} has other content" in refused(exported, tmp_path)


def test_a_truncated_export_is_refused(exported: Path, tmp_path: Path):
    shard = sorted(exported.glob("*.safetensors"))[1]
    os.truncate(shard, 100)
    assert f"{shard.name} has 100 bytes" in refused(exported, tmp_path)
    shard.unlink()
    assert f"{shard.name} is missing" in refused(exported, tmp_path)


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert f"holds no {EXPORT}" in refused(tmp_path / "empty", tmp_path)
    assert "does not exist" in refused(tmp_path / "nowhere", tmp_path)
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "was not written by `convert to-hf`" in refused(tmp_path / "empty", tmp_path)


def test_files_that_disagree_with_their_index_are_refused(exported: Path, tmp_path: Path):
    shard = sorted(exported.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    first = next(iter(tensors))
    save_file({f"{name}x" if name == first else name: tensor for name, tensor in tensors.items()}, shard)
    with pytest.raises(CheckpointError, match=re.escape(f"{INDEX} and the files disagree on the place of {first}")):
        SafetensorsFolder(exported)
    os.truncate(shard, 100)
    with pytest.raises(CheckpointError, match=f"is damaged: {shard.name} cannot be read"):
        SafetensorsFolder(exported)
    shard.unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        SafetensorsFolder(exported)
    shard.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        SafetensorsFolder(exported)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is empty"):
        SafetensorsFolder(tmp_path)


def test_weights_of_another_model_are_refused(save, tmp_path: Path):
    """A manifest with a valid checksum whose config is not that of its weights."""
    export(save(), tmp_path / "out", shard_bytes=SHARD)
    manifest = read_manifest(tmp_path / "out", EXPORT)
    model = {**manifest.config["model"], "d_model": 64, "num_layers": 3}
    other = replace(manifest, config={**manifest.config, "model": model})
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(tmp_path / "back", dict(SafetensorsFolder(tmp_path / "out")), other, tokenizer=None)
    message = caught.value.message
    assert "missing: blocks.2." in message
    assert "mid.gate.weight (float32[16, 32], the config says float32[16, 64])" in message


def test_an_output_that_exists_stays(save, exported: Path):
    with pytest.raises(CheckpointError, match="already exists"):
        export(save(), exported, shard_bytes=SHARD)


def test_a_full_disk_is_told_and_leaves_nothing(save, tmp_path: Path):
    checkpoint = save()
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SHARD // 2, most))
    try:
        with pytest.raises(CheckpointError, match="cannot write model-00001-of"):
            export(checkpoint, tmp_path / "full", shard_bytes=SHARD)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    assert [path for path in tmp_path.iterdir() if "full" in path.name] == []


def test_a_damaged_checkpoint_is_refused(save, tmp_path: Path):
    checkpoint = save()
    os.truncate(checkpoint / "__0_0.distcp", 100)
    with pytest.raises(CheckpointError, match="has 100 bytes"):
        export(checkpoint, tmp_path / "new", shard_bytes=SHARD)
    assert not (tmp_path / "new").exists()
