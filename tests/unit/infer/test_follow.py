"""A pass over a stream: figures by hand, parts that are asked again, a pass that was stopped, levels in files."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hopescale.checkpoint.manifest import Manifest, read_manifest
from hopescale.common.errors import CheckpointError, ConfigError, DataError, HopescaleError
from hopescale.config.load import from_dict, to_dict
from hopescale.config.schema import RunConfig
from hopescale.infer.adaptation import read_adaptation
from hopescale.infer.follow import StreamPass, read_stream
from hopescale.infer.generate import prefill
from hopescale.infer.in_context import InContextReader
from hopescale.infer.level_state import LEVELS, put_levels, read_levels
from hopescale.infer.load import LoadedModel
from hopescale.infer.state import read_state, write_state
from hopescale.models import Model

CADENCES = read_adaptation("--levels", "fast=5,slow=12", rate=0.5)


@cache
def make_config(*, attention: bool = False, **model: object) -> RunConfig:
    tree = to_dict(RunConfig())
    levels = {"fast": {"d_ff": 8}, "slow": {"d_ff": 8, "update_every_steps": 2}}
    tree["model"] = {"vocab_size": 24, "d_model": 8, "num_layers": 1, "num_heads": 2, "cms": {"levels": levels}}
    hope = {"hope": {"chunk_size": 8, "memory": "linear"}}
    tree["model"] |= {"mixers": {"attention": {"kind": "attention"}} if attention else hope, **model}
    tree["train"]["seq_len"] = 9
    return from_dict(tree, "test")


def make_loaded(seed: int = 3, **model: object) -> LoadedModel:
    config = make_config(**model)
    manifest = Manifest({"step": seed}, to_dict(config), {})
    return LoadedModel(Model(config.model, seed=seed).eval(), None, config, manifest, Path(f"step-{seed}"))


def make_documents(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(sum(lengths))
    return [generator.integers(24, size=length) for length in lengths]


def loss_of(logits: torch.Tensor, targets: np.ndarray) -> float:
    return float(F.cross_entropy(logits, torch.from_numpy(targets)))


def test_parts_are_measured_as_they_are_read_and_again_later():
    loaded, (text,) = make_loaded(), make_documents(41)
    followed = StreamPass(loaded, CADENCES, [text[:7], text[7:]], parts=2, probe_tokens=9)
    told: list[tuple[int, int]] = []
    followed.run(on_read=lambda *done: told.append(done))
    assert told[-1] == (followed.size, followed.size) and told == sorted(set(told))
    reader, tokens = InContextReader(make_loaded().model, CADENCES, 1), torch.from_numpy(text)[None]
    logits = torch.cat(list(reader.read(tokens[:, :-1], tokens[:, 1:])), 1)[0]
    assert followed.read == pytest.approx([loss_of(logits[:20], text[1:21]), loss_of(logits[20:], text[21:])])
    with torch.no_grad():
        for part, begin in enumerate((0, 20)):
            own, wanted = tokens[:, begin : begin + 9], text[begin + 1 : begin + 10]
            assert followed.trained[part] == pytest.approx(loss_of(loaded.model(own)[0][0], wanted))
            now = loaded.model(own, levels=reader.weights)[0][0]
            assert followed.after[-1][part] == pytest.approx(loss_of(now, wanted))
    assert [len(row) for row in followed.after] == [1, 2]
    assert followed.after[0][0] != followed.after[1][0] != followed.trained[0]
    assert len(list(followed.table())) == 3


def test_a_document_begins_anew_where_the_model_keeps_them_apart():
    documents = make_documents(9, 1, 17)
    apart = StreamPass(make_loaded(within_documents=True), CADENCES, documents, parts=1)
    apart.run()
    alone = StreamPass(make_loaded(within_documents=True), CADENCES, documents[2:], parts=1)
    alone.run()
    assert all(torch.equal(weight, alone.reader.weights[name]) for name, weight in apart.reader.weights.items())
    first = StreamPass(make_loaded(within_documents=True), CADENCES, documents[:1], parts=1)
    first.run()
    assert apart.read[0] * 24 == pytest.approx(first.read[0] * 8 + alone.read[0] * 16)


@pytest.mark.parametrize(
    ("settings", "lengths", "texts"),
    [
        ({"within_documents": True}, (9, 17), [(0, 0, 9), (1, 0, 17)]),
        ({"attention": True}, (27,), [(0, 0, 10), (0, 9, 19), (0, 18, 25)]),
    ],
)
def test_a_part_is_asked_again_in_the_texts_that_the_model_reads(settings: dict, lengths: tuple, texts: list):
    loaded, documents = make_loaded(**settings), make_documents(*lengths)
    followed = StreamPass(loaded, CADENCES, documents, parts=1, probe_tokens=24)
    followed.run()
    for levels, found in ((None, followed.trained[0]), (followed.reader.weights, followed.after[0][0])):
        total = 0.0
        for number, begin, end in texts:
            ids = torch.from_numpy(documents[number][begin:end])
            with torch.no_grad():
                total += (len(ids) - 1) * loss_of(loaded.model(ids[None, :-1], levels=levels)[0][0], ids[1:].numpy())
        assert found == pytest.approx(total / 24)


def test_a_pass_is_kept_between_documents(tmp_path: Path):
    cadences, documents = read_adaptation("--levels", "fast=2,slow=4", rate=0.5), make_documents(*[5] * 6)

    def begin() -> StreamPass:
        return StreamPass(make_loaded(within_documents=True), cadences, documents, parts=3, probe_tokens=5)

    def stop(line: str) -> None:
        if line.startswith("16 of 24"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin().run(tmp_path, save_every=7, report=stop)
    again, whole = begin(), begin()
    again.go_on(tmp_path)
    assert again.position == 8
    again.run()
    whole.run()
    assert again.report() == whole.report()


@pytest.mark.parametrize(
    ("settings", "nested"), [({}, False), ({"within_documents": True}, True), ({"attention": True}, False)]
)
def test_a_pass_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path, settings: dict, nested: bool):
    cadences = read_adaptation("--levels", "fast=4,slow=12", rate=0.5, nested=nested)
    documents = make_documents(23, 20)

    def begin() -> StreamPass:
        return StreamPass(make_loaded(**settings), cadences, documents, parts=3, probe_tokens=5)

    whole = begin()
    whole.run(tmp_path / "whole")

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin().run(tmp_path / "stopped", save_every=9, report=stop)
    again = begin()
    again.go_on(tmp_path / "stopped")
    assert 0 < again.position < whole.position
    again.run(tmp_path / "stopped")
    assert again.report() == whole.report()
    kept = read_levels(tmp_path / "stopped", begin().loaded)
    for name, weight in whole.reader.weights.items():
        assert torch.equal(weight, again.reader.weights[name]) and torch.equal(weight[0], kept[name])
    assert len(list((tmp_path / "stopped").iterdir())) == 3


def test_a_rate_of_zero_changes_nothing():
    followed = StreamPass(
        make_loaded(), read_adaptation("--levels", "fast=5,slow=12", rate=0), make_documents(41), parts=2
    )
    followed.run()
    assert followed.after[-1] == followed.trained


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Levels of `make_loaded()`."""
    StreamPass(make_loaded(), CADENCES, make_documents(27), parts=2).run(tmp_path)
    return tmp_path


def test_levels_take_the_place_of_the_trained_ones(kept: Path):
    loaded, reference = make_loaded(), make_loaded()
    followed = StreamPass(reference, CADENCES, make_documents(27), parts=2)
    followed.run()
    put_levels(kept, loaded)
    tokens = torch.arange(20)[None]
    expected = reference.model(tokens, levels=followed.reader.weights)[0]
    torch.testing.assert_close(loaded.model(tokens)[0], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(expected, make_loaded().model(tokens)[0], rtol=1e-3)


def test_states_belong_to_the_levels_that_they_were_read_with(kept: Path, tmp_path: Path):
    loaded, again, state = make_loaded(), make_loaded(), tmp_path / "state"
    put_levels(kept, loaded)
    state.mkdir()
    write_state(prefill(loaded.model, torch.arange(5)[None]), loaded, state)
    with pytest.raises(CheckpointError, match="is no state of step-3: the weights have the SHA-256"):
        read_state(state, again)
    put_levels(kept, again)
    assert read_state(state, again).state.position == 5


def test_levels_of_other_weights_are_refused(kept: Path):
    with pytest.raises(CheckpointError, match=r"holds no levels of step-4: the weights have the SHA-256"):
        put_levels(kept, make_loaded(seed=4))
    with pytest.raises(CheckpointError, match=r"holds no levels of step-3: model.num_heads"):
        put_levels(kept, make_loaded(num_heads=4))


def test_damaged_levels_are_refused(kept: Path, tmp_path: Path):
    (file,) = kept.glob("levels-*.pt")
    content = bytearray(file.read_bytes())
    content[-300] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"levels-26.pt has other content"):
        put_levels(kept, make_loaded())
    with pytest.raises(CheckpointError, match=f"there is no {LEVELS}"):
        put_levels(tmp_path / "nowhere", make_loaded())


def test_another_stream_or_cadence_does_not_go_on(kept: Path):
    for cadences, documents, problem in (
        (CADENCES, make_documents(28), "stream is "),
        (read_adaptation("--levels", "fast=5,slow=12", rate=0.4), make_documents(27), "levels is "),
    ):
        with pytest.raises(CheckpointError, match=f"holds another pass: {problem}"):
            StreamPass(make_loaded(), cadences, documents, parts=2).go_on(kept)
    assert read_manifest(kept, LEVELS).progress["tokens_read"] == 26


def test_steps_that_are_too_large_are_an_error():
    cadences = read_adaptation("--levels", "fast=2", rate=1e30)
    with pytest.raises(HopescaleError, match=r"the loss is no number after .* of 40 tokens"):
        StreamPass(make_loaded(), cadences, make_documents(41), parts=2).run()


def test_a_stream_of_ids_has_a_document_a_line(tmp_path: Path):
    file = tmp_path / "stream.txt"
    file.write_text("1 2 3\n\n4 23\n")
    assert [ids.tolist() for ids in read_stream(str(file), make_loaded())] == [[1, 2, 3], [4, 23]]
    file.write_text("1 2 24\n")
    with pytest.raises(DataError, match="has '24', but this model has no tokenizer, and ids up to 23"):
        read_stream(str(file), make_loaded())
    file.write_text("1\n2\n")
    with pytest.raises(DataError, match="no two tokens"):
        read_stream(str(file), make_loaded())
    with pytest.raises(ConfigError, match="--parts is 30, but the stream has 26 predictions"):
        StreamPass(make_loaded(), CADENCES, make_documents(27), parts=30)
