from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from hopescale.common.errors import DataError, HopescaleError
from hopescale.observe.metrics import METRICS, MetricsLog, read_metrics, template_of

DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def write(path: Path, *steps: int) -> None:
    log = MetricsLog(path, resume_step=None)
    for step in steps:
        log.log(step, 100 * step, {"loss": 1 / step})
    log.close()


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_a_record_returns_as_it_was_written(path: Path):
    before = time.time()
    log = MetricsLog(path, resume_step=None)
    log.log(10, 640, {"loss": 1 / 3, "lr/decay": 3e-4, "level/fast/updates": 10})
    assert len(read_metrics(path)) == 1, "a line is readable before the file is closed"
    log.log(20, 1280, {"val/text/loss": 2.5})
    log.close()
    first, second = read_metrics(path)
    assert list(first)[:3] == ["step", "tokens_seen", "time"]
    assert before - 1 <= first.pop("time") <= time.time() + 1
    assert first == {"step": 10, "tokens_seen": 640, "loss": 1 / 3, "lr/decay": 3e-4, "level/fast/updates": 10}
    assert second["val/text/loss"] == 2.5


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("loss", "loss"),
        ("lr/no_decay", "lr/<group>"),
        ("val/my.text/bits_per_byte", "val/<set>/bits_per_byte"),
        ("level/slow/update_rms", "level/<name>/update_rms"),
        ("memory/0/surprise", "memory/<layer>/surprise"),
    ],
)
def test_templates(name: str, template: str):
    assert template_of(name) == template


@pytest.mark.parametrize("name", ["los", "Loss", "lr", "lr/", "lr/a/b", "val/text", "val/text/accuracy", "time", ""])
def test_a_name_that_is_not_in_the_table_is_refused(path: Path, name: str):
    log = MetricsLog(path, resume_step=None)
    with pytest.raises(ValueError, match="unknown metric"):
        log.log(1, 1, {"loss": 1.0, name: 1.0})
    assert read_metrics(path) == []


def test_numbers_that_json_lacks_are_null(path: Path):
    log = MetricsLog(path, resume_step=None)
    log.log(1, 1, {"loss": float("nan"), "grad_norm": float("inf"), "tps": 1.0})
    line = path.read_text()
    assert json.loads(line, parse_constant=lambda text: pytest.fail(text))["loss"] is None
    assert read_metrics(path)[0]["grad_norm"] is None
    assert read_metrics(path)[0]["tps"] == 1.0


@pytest.mark.parametrize(("resume_step", "kept"), [(None, []), (0, []), (15, [10]), (20, [10, 20]), (99, [10, 20, 30])])
def test_a_resume_cuts_later_records_and_appends(path: Path, resume_step: int | None, kept: list[int]):
    write(path, 10, 20, 30)
    lines = path.read_text().splitlines()
    log = MetricsLog(path, resume_step=resume_step)
    assert path.read_text().splitlines() == lines[: len(kept)]
    log.log(40, 4000, {"loss": 1.0})
    log.close()
    assert steps(path) == [*kept, 40]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", [b'{"step": 40, "lo', b'{"step": 40}', b"\x00\x00\x00", b"17\n", b"\xff\n"])
def test_a_torn_last_line_is_dropped(path: Path, torn: bytes):
    write(path, 10, 20)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert steps(path) == [10, 20]
    MetricsLog(path, resume_step=20).close()
    assert path.read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_an_error_and_nothing_is_cut(path: Path):
    write(path, 10, 20, 30)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"?\n" + lines[2])
    for read in (lambda: read_metrics(path), lambda: MetricsLog(path, resume_step=10)):
        with pytest.raises(DataError, match="metrics.jsonl line 2 is not a record"):
            read()
    assert path.read_bytes() == lines[0] + b"?\n" + lines[2]


def test_a_full_disk_is_one_message(path: Path):
    log = MetricsLog(path, resume_step=None)
    log._file.close()
    with open("/dev/full", "w") as log._file:
        with pytest.raises(HopescaleError, match="metrics.jsonl: No space left on device"):
            log.log(1, 1, {"loss": 1.0})
        log.close()


def test_a_file_that_cannot_be_made_is_one_message(tmp_path: Path):
    with pytest.raises(HopescaleError, match="cannot write .*No such file"):
        MetricsLog(tmp_path / "nowhere" / "metrics.jsonl", resume_step=None)


def test_the_page_lists_every_metric():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in DOCS.read_text().splitlines()
        if line.startswith("| `")
    ]
    assert rows == [[f"`{name}`", metric.unit, metric.meaning] for name, metric in METRICS.items()]
