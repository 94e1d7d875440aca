from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hopescale.common.errors import ConfigError, HopescaleError
from hopescale.observe.trackers import TensorBoardTracker, Tracker, Trackers, open_trackers


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


class Failing(Tracker):
    def log(self, step: int, values):
        raise ConnectionError("the service is down")

    def close(self) -> None:
        raise AssertionError("it was left before")


def test_a_service_that_fails_is_left_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    makers = {"wandb": Failing, "tensorboard": lambda: TensorBoardTracker(tmp_path / "tb", resume_step=None)}
    trackers = Trackers(makers)
    for step in (1, 2):
        trackers.log(step, {"loss": 4.0}, {})
    trackers.close()
    assert caplog.text.count("wandb has failed, and the run goes on without it: the service is down") == 1
    assert shown(tmp_path / "tb", "loss") == [(1, 4.0), (2, 4.0)]


def test_a_missing_package_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hopescale.observe.trackers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="log.trackers has wandb, but the package wandb is not installed") as caught:
        open_trackers(["wandb"], tmp_path, name="run", config={}, resume_step=None)
    assert "hopescale[wandb]" in caught.value.hint


def test_mlflow_needs_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI does not say where its server is"):
        open_trackers(["mlflow"], tmp_path, name="run", config={}, resume_step=None)


def test_mlflow_keeps_one_run_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "server").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # stands in for a server
    for resume_step in (None, 2):
        about = {"name": "run", "config": {"optim.lr": 0.1}, "resume_step": resume_step}
        trackers = open_trackers(["mlflow"], tmp_path, **about)
        trackers.log(1 + (resume_step or 0), {"loss": 4.0, "lr/decay*0.5": 0.1}, {})
        trackers.close()
    client, id = mlflow.MlflowClient(), (tmp_path / "mlflow_id").read_text().strip()
    assert [(metric.step, metric.value) for metric in client.get_metric_history(id, "loss")] == [(1, 4.0), (3, 4.0)]
    assert client.get_run(id).data.params == {"optim.lr": "0.1"}
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
