"""Data and checkpoints on an object store: a run that loses its folder goes on as if it had not, bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import pytest

from hopescale.checkpoint.manifest import MANIFEST, Manifest, describe_file, to_json
from hopescale.checkpoint.mirror import Mirror
from hopescale.common import object_store
from hopescale.common.errors import CheckpointError
from hopescale.config.layout import Layout
from hopescale.config.load import load_recipe
from hopescale.data.storage import publish
from hopescale.train.folder import RunFolder
from hopescale.train.request import RunRequest
from hopescale.train.starting_point import choose_checkpoint
from tests.integration.conftest import Run
from tests.support.s3 import serve_bucket

SIZES = (
    "model.vocab_size=300",
    "data.sources.markov=null",
    "data.max_epochs=100",
    "train.steps=6",
    "train.seq_len=32",
    "train.validation.every=null",
    "checkpoint.every=2",
    "checkpoint.keep_last=1",
)


@pytest.fixture(params=["memory", "s3"])
def bucket(request: pytest.FixtureRequest):
    if request.param == "s3":
        with serve_bucket() as address:
            yield address
    else:
        yield "memory://bucket"
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_a_run_that_loses_its_folder_goes_on(hopescale, tiny, text_data: Path, bucket: str, tmp_path: Path):
    def train(run: str, data: object, *args: object) -> str:
        source = f"data.sources.text.path={data}"
        done = hopescale("train", "debug", *tiny, *SIZES, source, *args, "--run-dir", tmp_path / run)
        assert done.code == 0, done.err
        return done.out

    publish(text_data / "data", f"{bucket}/data")
    train("whole", text_data / "data")
    far = (f"{bucket}/data", f"data.cache={tmp_path / 'cache'}", f"checkpoint.mirror={bucket}/run")
    train("lost", *far, "--stop-at", "3")
    shutil.rmtree(tmp_path / "lost")
    assert "at step 3" in train("lost", *far, "--resume", "must")
    whole, found = Run(tmp_path / "whole").tensors(6), Run(tmp_path / "lost").tensors(6)
    assert whole.keys() == found.keys() and all(whole[name].equal(found[name]) for name in whole)
    names = object_store.ObjectStore(f"{bucket}/run").names()
    assert names == ["latest", "run", "step-00000006"]


@pytest.fixture
def mirrored(tmp_path: Path):
    """A folder with one complete checkpoint, its copy, and the arguments of a start."""
    root = tmp_path / "checkpoints"
    folder = root / "step-00000002"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"abc")
    manifest = Manifest({"step": 2}, {}, {}, files={"weights": describe_file(folder / "weights")})
    (folder / MANIFEST).write_text(to_json(manifest))
    (root / "latest").write_text("step-00000002\n")
    mirror = Mirror("memory://bucket/run")
    mirror.begin(root, keep_last=1, keep_every=None)
    yield root, mirror, object_store.ObjectStore("memory://bucket/run")
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_a_copy_that_was_torn_is_sent_again(mirrored, caplog: pytest.LogCaptureFixture):
    root, mirror, store = mirrored
    assert store.names() == ["latest", "run", "step-00000002"], "no copy at all is one that is not whole"
    mirror.begin(root, keep_last=1, keep_every=None)
    assert "is sent again" not in caplog.text
    store.write("latest", b"step-00000001\n")
    fsspec.filesystem("memory").rm("/bucket/run/step-00000002/weights")
    store.write("step-00000001/weights", b"kept")
    mirror.begin(root, keep_last=1, keep_every=None, keep_at=(1,))
    assert store.read("step-00000001/weights") == b"kept"
    assert "step-00000002 is not whole at memory://bucket/run: it is sent again" in caplog.text
    assert store.read("latest") == b"step-00000002\n" and store.read("step-00000002/weights") == b"abc"


def test_an_address_belongs_to_one_run(mirrored, tmp_path: Path):
    root, mirror, _ = mirrored
    shutil.copytree(root, tmp_path / "other")
    (tmp_path / "other" / "run").unlink()
    with pytest.raises(CheckpointError, match="memory://bucket/run holds the checkpoints of another run"):
        mirror.begin(tmp_path / "other", keep_last=1, keep_every=None)
    mirror.begin(tmp_path / "lost", keep_last=1, keep_every=None)
    assert (tmp_path / "lost" / "run").read_text() == (root / "run").read_text()
    assert (tmp_path / "lost" / "step-00000002" / "weights").read_bytes() == b"abc"


def test_a_look_ahead_finds_what_a_start_would_and_writes_nothing(mirrored, tmp_path: Path):
    root, _, store = mirrored
    loaded = load_recipe("debug", ["checkpoint.mirror=memory://bucket/run"])
    lost, foreign = RunFolder(tmp_path / "lost"), RunFolder(tmp_path / "foreign")
    names = store.names()
    found = choose_checkpoint(lost, RunRequest(loaded, Layout(), lost.path, resume="must"), writes=False)
    assert found == lost.checkpoints / "step-00000002" and not lost.path.exists() and store.names() == names
    assert choose_checkpoint(lost, RunRequest(loaded, Layout(), lost.path, resume="must")) == found
    (lost.checkpoints / "step-00000002" / "weights").unlink()
    for writes in (False, True):
        assert choose_checkpoint(lost, RunRequest(loaded, Layout(), lost.path), writes=writes) == found
    assert (found / "weights").read_bytes() == b"abc"
    shutil.copytree(root, foreign.checkpoints)
    (foreign.checkpoints / "run").unlink()
    for writes in (False, True):
        with pytest.raises(CheckpointError, match="holds the checkpoints of another run"):
            choose_checkpoint(foreign, RunRequest(loaded, Layout(), foreign.path), writes=writes)
    assert not (foreign.checkpoints / "run").exists() and store.names() == names


@pytest.mark.parametrize("resume", ["never", "path", "path of old"])
def test_a_start_that_takes_nothing_from_a_mirror_leaves_it_alone(mirrored, tmp_path: Path, resume: str):
    root, _, store = mirrored
    loaded = load_recipe("debug", ["checkpoint.mirror=memory://bucket/run", "checkpoint.keep_at=[1]"])
    how = "never" if resume == "never" else root / "step-00000002"
    if own := resume == "path of old":
        (tmp_path / "new" / "checkpoints").mkdir(parents=True)
        shutil.copy(root / "run", tmp_path / "new" / "checkpoints")
    request = RunRequest(loaded, Layout(), tmp_path / "new", resume=how)
    if own:
        assert choose_checkpoint(RunFolder(tmp_path / "new"), request) == how
    else:
        with pytest.raises(CheckpointError, match="memory://bucket/run holds the checkpoints of another run"):
            choose_checkpoint(RunFolder(tmp_path / "new"), request)
    assert [*(tmp_path / "new").glob("*/*")] == [tmp_path / "new" / "checkpoints" / "run"] * own
    assert store.read("run").decode() == (root / "run").read_text()


def test_a_new_run_refuses_a_mirror_with_checkpoints(mirrored):
    root, mirror, _ = mirrored
    with pytest.raises(CheckpointError, match="memory://bucket/run already holds checkpoints"):
        mirror.check_unused(root)


def test_a_store_that_does_not_answer_costs_a_warning_and_no_checkpoint(
    hopescale, tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(object_store, "_WAITS", ())

    def upload(self, *args):
        raise OSError(None, "no answer after 5 retries", "memory://gone")

    monkeypatch.setattr(object_store.ObjectStore, "upload", upload)
    args = ("train.steps=2", "checkpoint.mirror=memory://gone/run", "--run-dir", tmp_path / "run")
    assert hopescale("train", "debug", *tiny, *args).code == 0
    assert "cannot send step-00000002 to memory://gone/run: no answer" in caplog.text
    assert Run(tmp_path / "run").steps() == [2]
    done = hopescale("train", "debug", *tiny, "checkpoint.mirror=nosuch://a/b", "--run-dir", tmp_path / "other")
    assert done.code == 4 and "cannot reach checkpoint.mirror nosuch://a/b" in done.err


def test_a_branch_in_a_new_folder_does_not_take_up_the_copies_of_another_run(mirrored, tmp_path: Path):
    root, mirror, store = mirrored
    loaded = load_recipe("debug", [f"checkpoint.mirror={mirror.address}"])
    request = RunRequest(loaded, Layout(), tmp_path / "branch", branch_from=root)
    for named in (True, False):  # another run, and copies of one that has left no name
        with pytest.raises(CheckpointError, match="holds the checkpoints of another run") as caught:
            choose_checkpoint(RunFolder(request.folder), request)
        assert "--resume must without --branch-from continues that run" in caught.value.hint
        assert not request.folder.exists()
        if named:
            fsspec.filesystem("memory").rm("/bucket/run/run")
    assert store.names() == ["latest", "step-00000002"]


def test_a_branch_takes_an_address_at_which_nothing_was_saved(mirrored, tmp_path: Path):
    """Another start has left its name there, and no checkpoint."""
    root, _, _ = mirrored
    store = object_store.ObjectStore("memory://unused/run")
    store.write("run", b"another\n")
    loaded = load_recipe("debug", ["checkpoint.mirror=memory://unused/run"])
    request = RunRequest(loaded, Layout(), tmp_path / "branch", branch_from=root)
    try:
        choose_checkpoint(RunFolder(request.folder), request)
        assert store.read("run") == (request.folder / "checkpoints" / "run").read_bytes() != b"another\n"
    finally:
        fsspec.filesystem("memory").rm("/unused", recursive=True)


def test_a_branch_that_loses_its_folder_goes_on_from_its_own_copies(hopescale, tiny, tmp_path: Path):
    def train(run: str, *args: object) -> str:
        sizes = ("train.steps=6", "train.validation.every=null", "checkpoint.every=2")
        done = hopescale("train", "debug", *tiny, *sizes, *args, "--run-dir", tmp_path / run)
        assert done.code == 0, done.err
        return done.out

    train("trunk", "--stop-at", "2")
    branch = ("--branch-from", tmp_path / "trunk", "optim.lr=2e-3")
    train("whole", *branch)
    mirrored = (*branch, "checkpoint.mirror=memory://branch/run")
    try:
        train("lost", *mirrored, "--stop-at", "4")
        shutil.rmtree(tmp_path / "lost" / "checkpoints" / "step-00000004")
        shutil.rmtree(tmp_path / "lost" / "checkpoints" / "step-00000002", ignore_errors=True)
        (tmp_path / "lost" / "checkpoints" / "latest").unlink()
        assert "at step 4" in train("lost", *mirrored, "--stop-at", "5")
        shutil.rmtree(tmp_path / "lost")
        assert "at step 5" in train("lost", *mirrored)
        whole, found = Run(tmp_path / "whole").tensors(6), Run(tmp_path / "lost").tensors(6)
        assert whole.keys() == found.keys() and all(whole[name].equal(found[name]) for name in whole)
        other = hopescale("train", "debug", *tiny, *mirrored, "optim.lr=1e-3", "--run-dir", tmp_path / "other")
        assert other.code == 4 and "holds the checkpoints of another run" in other.err
    finally:
        fsspec.filesystem("memory").rm("/branch", recursive=True)


def test_a_micro_batch_by_itself_stays_when_its_run_is_fetched(hopescale, tiny, tmp_path: Path):
    def train(size: object, *args: object) -> str:
        how = ("train.steps=3", "checkpoint.mirror=memory://auto/run", f"train.micro_batch_size={size}")
        done = hopescale("train", "debug", *tiny, *how, *args, "--run-dir", tmp_path / "run")
        assert done.code == 0, done.err
        return done.out

    try:
        train(1, "--stop-at", "1")
        shutil.rmtree(tmp_path / "run")
        for dry in (["--dry-run"], []):
            assert not (tmp_path / "run").exists()
            assert "train.micro_batch_size: 1, as before" in train("auto", "--resume", "must", *dry)
        assert load_recipe(str(tmp_path / "run" / "config.yaml")).config.train.micro_batch_size == "auto"
        assert json.loads((tmp_path / "run" / "plan.json").read_text())["micro_batch_size"] == 1
        assert Run(tmp_path / "run").manifest(3).config["train"]["micro_batch_size"] == 1
    finally:
        fsspec.filesystem("memory").rm("/auto", recursive=True)
