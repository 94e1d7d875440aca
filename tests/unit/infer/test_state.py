"""A state written and read again continues exactly; one that does not fit is refused."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hopescale.checkpoint.manifest import describe_file, read_manifest, to_json
from hopescale.common.errors import CheckpointError
from hopescale.infer.generate import generate, prefill
from hopescale.infer.load import LoadedModel
from hopescale.infer.sampling import Sampling
from hopescale.infer.state import STATE, TENSORS, read_state, write_state
from tests.support.loaded import KINDS, make_loaded, make_tokens

LENGTHS = (5, 8, 21)


def continued(loaded: LoadedModel, reading, count: int) -> tuple[list[int], torch.Tensor]:
    """Return greedy tokens, and the logits after the last of them."""
    steps = list(generate(loaded.model, reading, max_tokens=count, sampling=Sampling(), generator=torch.Generator()))
    return [int(s.token[0]) for s in steps], prefill(loaded.model, steps[-1].token[:, None], steps[-1].state)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A state of `make_loaded()`."""
    loaded = make_loaded()
    write_state(prefill(loaded.model, make_tokens(21)), loaded, tmp_path)
    return tmp_path


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("kind", "precision"), [*[(kind, "fp32") for kind in KINDS], ("hope", "bf16")])
def test_a_continuation_from_a_file_equals_one_in_one_go(tmp_path: Path, kind: str, precision: str, length: int):
    loaded = make_loaded(kind, precision)
    reading = prefill(loaded.model, make_tokens(length))
    in_one_go, last = continued(loaded, reading, 20)
    begun, middle = continued(loaded, reading, 9)
    write_state(middle, loaded, tmp_path)
    again = make_loaded(kind, precision)
    found = read_state(tmp_path, again)
    assert found.state.position == length + 9
    assert torch.equal(found.logits, middle.logits)
    rest, end = continued(again, found, 11)
    assert begun + rest == in_one_go and not torch.equal(found.logits, last.logits)
    assert torch.equal(end.logits, last.logits)
    for before, after in zip(last.state.layers, end.state.layers, strict=True):
        expected, actual = before.named(), after.named()
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[name], actual[name]) for name in expected)


WEIGHTS = {f"{kind}/{layer}" for kind in ("running", "momentum", "boundary") for layer in ("first", "wide", "narrow")}
FAR = ("running", "boundary")
NAMES = {
    "hope": ({}, {f"memory/{name}" for name in WEIGHTS} | {"conv_tail"}),
    "two banks": (
        {"mixers": {"hope": {"chunk_size": 8, "projection_chunk_size": 16, "conv_width": None}}},
        {f"memory/{name}" for name in WEIGHTS if "narrow" not in name} | {f"projection/{name}" for name in WEIGHTS},
    ),
    "far memory": (
        {"mixers": {"hope": {"chunk_size": 8, "conv_width": None, "far": {"chunk_size": 16}}}},
        {f"memory/{name}" for name in WEIGHTS} | {f"far/{k}/{w}" for k in FAR for w in ("first", "wide")},
    ),
    "linear": (
        {"mixers": {"hope": {"memory": "linear", "momentum": False}}},
        {"memory/running/first", "memory/boundary/first", "conv_tail"},
    ),
    "attention": ({"mixers": {"attention": {"kind": "attention"}}}, {"k", "v"}),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_in_files_stay(tmp_path: Path, kind: str):
    """States that were written before must be readable for ever: these are their names."""
    settings, names = NAMES[kind]
    loaded = make_loaded(**settings)
    reading = prefill(loaded.model, make_tokens(21))
    write_state(reading, loaded, tmp_path)
    assert set(torch.load(tmp_path / TENSORS)) == {"logits"} | {f"{i}.{name}" for i in (0, 1) for name in names}
    again = read_state(tmp_path, loaded).state
    for before, after in zip(reading.state.layers, again.layers, strict=True):
        assert type(after.tensors) is type(before.tensors) and after.position == 21
        assert all(torch.equal(before.named()[name], after.named()[name]) for name in names)


def test_a_text_read_in_two_sittings_equals_one_text(written: Path):
    loaded = make_loaded()
    more = make_tokens(6)
    found = prefill(loaded.model, more, read_state(written, loaded).state)
    expected = prefill(loaded.model, torch.cat([make_tokens(21), more], dim=1))
    assert found.state.position == expected.state.position == 27
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_a_file_holds_one_state_however_long_the_text(tmp_path: Path):
    loaded, sizes = make_loaded(), []
    for length in (9, 90):
        folder = tmp_path / str(length)
        folder.mkdir()
        write_state(prefill(loaded.model, make_tokens(length)), loaded, folder)
        sizes.append((folder / TENSORS).stat().st_size)
    assert sizes[0] == sizes[1] < 100_000


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"seed": 4}, ["the weights", "step 3 of step-3", "step-4"]),
        ({"d_model": 32}, ["model.d_model is 32, but 16 in"]),
        ({"kind": "hope_attention"}, ["model.mixers.hope.kind is (absent), but self_modifying in"]),
        ({"precision": "bf16"}, ["train.precision is bf16, but fp32 in"]),
    ],
)
def test_another_model_is_refused(written: Path, other: dict, said: list[str]):
    with pytest.raises(CheckpointError, match="is no state of") as caught:
        read_state(written, make_loaded(**other))
    assert all(text in caught.value.message for text in said) and caught.value.hint


def test_periods_of_levels_may_have_changed(written: Path):
    levels = {"fast": {"d_ff": 16}, "slow": {"d_ff": 16, "update_every_steps": 8}}
    assert read_state(written, make_loaded(cms={"levels": levels})).state.position == 21


def damage_bit(folder: Path) -> None:
    content = bytearray((folder / TENSORS).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / TENSORS).write_bytes(content)


def damage_header(folder: Path) -> None:
    (folder / STATE).write_text((folder / STATE).read_text().replace('"tokens_read": 21', '"tokens_read": 20'))


def rewritten(folder: Path, **changes: object) -> None:
    files = {TENSORS: describe_file(folder / TENSORS)}
    (folder / STATE).write_text(to_json(replace(read_manifest(folder, STATE), files=files, **changes)))


def other_tensors(folder: Path) -> None:
    tensors = torch.load(folder / TENSORS)
    del tensors["1.conv_tail"]
    torch.save(tensors, folder / TENSORS)
    rewritten(folder)


def other_shapes(folder: Path) -> None:
    tensors = torch.load(folder / TENSORS)
    tensors["1.conv_tail"] = tensors["1.conv_tail"][:, :1].clone()
    torch.save(tensors, folder / TENSORS)
    entries = read_manifest(folder, STATE).tensors
    rewritten(folder, tensors=entries | {"1.conv_tail": replace(entries["1.conv_tail"], shape=(1, 1, 48))})


class Trap:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("trapped",)


def code_instead_of_tensors(folder: Path) -> None:
    torch.save({"logits": Trap()}, folder / TENSORS)
    rewritten(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_bit, "state.pt has other content than the manifest's SHA-256 says"),
        (lambda folder: os.truncate(folder / TENSORS, 100), "state.pt has 100 bytes, the manifest says"),
        (lambda folder: (folder / TENSORS).unlink(), "state.pt is missing"),
        (lambda folder: os.truncate(folder / STATE, 100), "not valid JSON"),
        (lambda folder: (folder / STATE).unlink(), "is no state: it holds no state.json"),
        (damage_header, "does not match its checksum"),
        (other_tensors, "other tensors than the model carries"),
        (other_shapes, "other tensors than the model carries"),
        (code_instead_of_tensors, "cannot read"),
    ],
)
def test_a_damaged_state_is_refused(written: Path, damage, said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(written)
    damage(written)
    with pytest.raises(CheckpointError, match=said):
        read_state(written, make_loaded())
    assert not (written / "trapped").exists()


def test_the_header_says_what_it_is(written: Path):
    body = json.loads((written / STATE).read_text())
    assert body["progress"] == {"step": 3, "checkpoint": "step-3", "tokens_read": 21}
    assert body["config"]["model"]["d_model"] == 16 and len(body["identity"]["weights"]) == 64
