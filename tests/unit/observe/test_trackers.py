from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hopescale.common.errors import ConfigError, HopescaleError
from hopescale.observe.queued_tracker import QueuedTracker, Tracker
from hopescale.observe.trackers import TensorBoardTracker, Trackers, open_trackers, require_trackers


def shown(folder: Path, name: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(name)]


def write(folder: Path, resume_step: int | None, values: dict[int, float]) -> None:
    tracker = TensorBoardTracker(folder, resume_step=resume_step)
    for step, value in values.items():
        tracker.log(step, {"loss": value, "lr/decay": 0.5})
    tracker.close()


def test_values_are_shown_before_the_file_is_closed(tmp_path: Path):
    tracker = TensorBoardTracker(tmp_path / "tb", resume_step=None)
    tracker.log(10, {"loss": 4.0})
    tracker.log(20, {"loss": 3.0})
    assert shown(tmp_path / "tb", "loss") == [(10, 4.0), (20, 3.0)]
    tracker.close()


def test_a_resume_replaces_later_steps_in_the_same_folder(tmp_path: Path):
    write(tmp_path, None, {10: 4.0, 20: 3.0, 30: 2.0})
    write(tmp_path, 20, {30: 1.0, 40: 0.5})
    assert shown(tmp_path, "loss") == [(10, 4.0), (20, 3.0), (30, 1.0), (40, 0.5)]
    assert shown(tmp_path, "lr/decay")[-1] == (40, 0.5)
    assert all(path.is_file() for path in tmp_path.iterdir())


def test_a_run_begun_anew_hides_the_old_one(tmp_path: Path):
    write(tmp_path, None, {10: 4.0, 20: 3.0})
    write(tmp_path, None, {10: 1.0})
    assert shown(tmp_path, "loss") == [(10, 1.0)]


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path: Path):
    (tmp_path / "tb").write_text("a file")
    with pytest.raises(HopescaleError, match="cannot write .*tb"):
        TensorBoardTracker(tmp_path / "tb", resume_step=None)


def test_distributions_are_histograms_of_what_is_finite(tmp_path: Path):
    tracker = TensorBoardTracker(tmp_path / "tb", resume_step=None)
    tracker.log_values(
        3, {"memory/0/eta": torch.tensor([0.1, 0.2, float("nan")]), "none": torch.tensor([float("inf")])}
    )
    accumulator = EventAccumulator(str(tmp_path / "tb"))
    accumulator.Reload()
    assert accumulator.Tags()["histograms"] == ["memory/0/eta"]
    (event,) = accumulator.Histograms("memory/0/eta")
    assert event.step == 3 and event.histogram_value.num == 2
    tracker.close()


class Service(Tracker):
    """A service that gives no answer until `answers` is set, and fails as often as `failures` says."""

    def __init__(self, failures: int = 0):
        self.answers, self.failures, self.records = threading.Event(), failures, []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        assert self.answers.wait(60)
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the service is down")
        self.records.append((step, dict(values)))

    def close(self) -> None:
        self.records.append("closed")


def test_a_run_does_not_wait_for_a_service_and_says_once_what_is_dropped(caplog: pytest.LogCaptureFixture):
    service = Service()
    tracker = QueuedTracker("wandb", lambda: service, room=3)
    for step in range(20):
        tracker.log(step, {"loss": 4.0})
    service.answers.set()
    tracker.close()
    *sent, end = service.records
    assert end == "closed" and [step for step, _ in sent] in ([0, 1, 2, 3], [0, 1, 2])
    assert caplog.text.count("is dropped") == 1
    assert f"{20 - len(sent)} of 20 records have not reached wandb" in caplog.text


def test_a_service_that_comes_back_gets_all_records(caplog: pytest.LogCaptureFixture):
    service, opened = Service(failures=3), []
    service.answers.set()

    def make() -> Service:
        opened.append(1)
        return service

    tracker = QueuedTracker("wandb", make, waits=(0.0,) * 3)
    for step in range(5):
        tracker.log(step, {"loss": 4.0})
    while len(service.records) < 5:
        time.sleep(0.01)
    tracker.close()
    assert [record[0] for record in service.records[:5]] == list(range(5)) and len(opened) == 4
    assert caplog.text.count("the service is down") == 1 and "dropped" not in caplog.text


@pytest.mark.parametrize("failures", [0, 10**9])
def test_the_end_of_a_run_waits_no_longer_than_it_is_to(failures: int, caplog: pytest.LogCaptureFixture):
    """For a service that gives no answer, or refuses everything."""
    service = Service(failures)
    if failures:
        service.answers.set()
    tracker = QueuedTracker("mlflow", lambda: service, waits=(60.0,), patience=0.05 if not failures else 60)
    for step in range(5):
        tracker.log(step, {"loss": 4.0})
    tracker.close()
    service.answers.set()
    assert "5 of 5 records have not reached mlflow" in caplog.text


def test_what_was_drawn_of_a_course_given_up_is_hidden(tmp_path: Path):
    tracker = TensorBoardTracker(tmp_path / "tb", resume_step=None)
    for step in (10, 20, 30):
        tracker.log(step, {"loss": 4.0})
    trackers = Trackers([tracker])
    trackers.go_back(10)
    trackers.log(20, {"loss": 3.0}, {})
    trackers.close()
    assert shown(tmp_path / "tb", "loss") == [(10, 4.0), (20, 3.0)]


def test_texts_are_shown(tmp_path: Path):
    tracker = TensorBoardTracker(tmp_path / "tb", resume_step=None)
    tracker.log_texts(7, {"sample/0": "Once *upon*\na time"})
    tracker.close()
    accumulator = EventAccumulator(str(tmp_path / "tb"))
    accumulator.Reload()
    (event,) = accumulator.Tensors("sample/0/text_summary")
    assert event.step == 7 and event.tensor_proto.string_val[0] == b"    Once *upon*\n    a time\n"


def test_a_missing_package_is_one_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hopescale.observe.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="log.trackers has wandb, but the package wandb is not installed") as caught:
        require_trackers(["wandb"])
    assert "hopescale[wandb]" in caught.value.hint


def test_mlflow_needs_a_server(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI does not say where its server is"):
        require_trackers(["mlflow"])


def test_mlflow_keeps_one_run_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "server").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # stands in for a server
    for resume_step in (None, 2):
        about = {"name": "run", "config": {"optim.lr": 0.1}, "resume_step": resume_step}
        trackers = open_trackers(["mlflow"], tmp_path, **about)
        trackers.log(1 + (resume_step or 0), {"loss": 4.0, "lr/decay*0.5": 0.1}, {})
        trackers.log_texts(1, {"sample/0": "Once"})
        trackers.close()
    client, id = mlflow.MlflowClient(), (tmp_path / "mlflow_id").read_text().strip()
    assert [(metric.step, metric.value) for metric in client.get_metric_history(id, "loss")] == [(1, 4.0), (3, 4.0)]
    assert client.get_run(id).data.params == {"optim.lr": "0.1"}
    assert client.get_run(id).info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(id, "sample/0")] == ["sample/0/step-00000001.txt"]
    assert "lr/decay_0.5" in client.get_run(id).data.metrics


def test_wandb_keeps_one_run_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for resume_step in (None, 2):
        trackers = open_trackers(["wandb"], tmp_path, name="run", config={}, resume_step=resume_step)
        trackers.log(3, {"loss": 4.0}, {})
        trackers.close()
        ids.append((tmp_path / "wandb_id").read_text())
    assert ids[0] == ids[1]
    assert len(list(tmp_path.glob(f"wandb/offline-run-*/run-{ids[0].strip()}.wandb"))) >= 1
