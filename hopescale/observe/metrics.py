"""The names of all metrics, and `metrics.jsonl`, the record of a run. Knows nothing of how a number is made."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hopescale.common.errors import DataError, HopescaleError


@dataclass(frozen=True)
class Metric:
    """Unit and meaning of a metric. The unit of a pure number is `1`."""

    unit: str
    meaning: str


METRICS: dict[str, Metric] = {
    "loss": Metric("nats", "Mean cross-entropy per token of this step's batch."),
    "grad_norm": Metric("1", "Global norm of the gradient before clipping."),
    "steps_skipped": Metric("1", "Bad steps skipped since the start of the run; on steps that were skipped."),
    "lr/<group>": Metric(
        "1", "Learning rate of a parameter group at this step; with `model.transfer` of each part, `<group>*<factor>`."
    ),
    "tps": Metric("tokens/s", "Tokens per second per device since the last record."),
    "mfu": Metric("1", "Model FLOPs per second as a fraction of the device's peak, since the last record."),
    "time/step_s": Metric("s", "Mean duration of a step since the last record, waiting for data included."),
    "time/data_s": Metric("s", "Mean time per step in which the host read data, since the last record."),
    "device_memory/peak_gib": Metric("GiB", "Highest device memory allocated so far; on CPU of the process's memory."),
    "val/<set>/loss": Metric("nats", "Mean cross-entropy per token of the held-out text of a data set."),
    "val/<set>/bits_per_byte": Metric("bits", "The same per byte of text: comparable between tokenizers."),
    "level/<name>/updates": Metric(
        "1",
        "Updates of a level since the start of the run by its cadence, bad steps that were skipped counted; the mean "
        "of its blocks, if it is rolling.",
    ),
    "level/<name>/grad_norm": Metric("1", "Norm of the gradient of a level at its last update."),
    "level/<name>/update_rms": Metric("1", "Root mean square of the change of a level's weights at its last update."),
    "level/<name>/bytes": Metric(
        "bytes",
        "Bytes that rank 0 sent to sum a level's gradients over replicas, at its last update (zero 0, 1); planned.",
    ),
    "comm/bytes_per_step": Metric(
        "bytes", "Tensors that rank 0 sent, per training step since the last record; planned."
    ),
    "comm/<axis>/bytes_per_step": Metric(
        "bytes",
        "The part of one axis (tp, node, dp, cp, pp, embedding, world); `dp` is all that gradients are summed over, "
        "but for what `parallel.shard: node` sends inside `node`.",
    ),
    "memory/<layer>/eta_mean": Metric("1", "Mean inner learning rate of a layer's memories over the last batch."),
    "memory/<layer>/alpha_mean": Metric("1", "Mean retention per token of a layer's memories over the last batch."),
    "memory/<layer>/state_norm": Metric(
        "1",
        "Largest norm of a matrix of a head's memories after a sequence of the last batch, or a piece of one; it "
        "doubles from record to record before memories explode.",
    ),
    "memory/<layer>/surprise": Metric(
        "1", "Mean norm of the main memory's inner error (read minus target) over a micro batch."
    ),
}
"""Every name a record may hold; `<word>` stands for one part without a slash."""


def template_of(name: str) -> str:
    """Return the entry of `METRICS` that a name belongs to: `lr/<group>` for `lr/decay`.

    Raises:
        ValueError: If the table has no such name.
    """
    parts = name.split("/")
    for template in METRICS:
        wanted = template.split("/")
        if len(wanted) == len(parts) and all(map(_fits, wanted, parts)):
            return template
    near = difflib.get_close_matches(name, METRICS, n=1)
    hint = f", did you mean {near[0]}?" if near else ""
    raise ValueError(f"unknown metric {name!r}{hint} (see docs/metrics.md)")


def _fits(wanted: str, part: str) -> bool:
    return bool(part) if wanted.startswith("<") else wanted == part


class MetricsLog:
    """The append-only record of a run: one JSON object per line, each handed to the system as it is written.

    Numbers that JSON does not have (NaN, infinities) are recorded as null.

    Args:
        path: `metrics.jsonl` of the run; made if missing.
        resume_step: Step the run continues from: later records are cut, as is a last line torn by a kill. None starts
            the record anew.

    Raises:
        DataError: If another line than the last is not a record.
        HopescaleError: If the file cannot be written.
    """

    def __init__(self, path: Path, *, resume_step: int | None):
        self.path = path
        try:
            _cut(path, -1 if resume_step is None else resume_step)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise _failure(self.path, error) from error

    def log(self, step: int, tokens_seen: int, values: Mapping[str, float]) -> None:
        """Append a record: the values, the step, the tokens seen by the run so far, and the time in Unix seconds.

        Raises:
            ValueError: If a name is not in `METRICS`; nothing is written.
            HopescaleError: If the file cannot be written.
        """
        for name in values:
            template_of(name)
        head = {"step": step, "tokens_seen": tokens_seen, "time": round(time.time(), 3)}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._file.write(json.dumps({**head, **finite}, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise _failure(self.path, error) from error

    def close(self) -> None:
        """Close the file."""
        # Only a line whose failure `log` has reported can still be pending.
        with contextlib.suppress(OSError):
            self._file.close()


class TextLog:
    """Texts of a run, `samples.jsonl`: the step, a name and the text on each line. Arguments: those of `MetricsLog`."""

    def __init__(self, path: Path, *, resume_step: int | None):
        self.path = path
        try:
            _cut(path, -1 if resume_step is None else resume_step)
        except OSError as error:
            raise _failure(path, error) from error

    def log(self, step: int, texts: Mapping[str, str]) -> None:
        """Append texts, by name; the file is made with the first of them.

        Raises:
            HopescaleError: If the file cannot be written.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                for name, text in texts.items():
                    file.write(json.dumps({"step": step, "name": name, "text": text}) + "\n")
        except OSError as error:
            raise _failure(self.path, error) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a record; a last line torn by a kill is left out. A value that was NaN or infinite is None.

    Raises:
        DataError: If another line than the last is not a record.
    """
    return [record for _, record in _records(path)]


def read_last(path: Path, num_bytes: int = 2**18) -> list[dict[str, Any]]:
    """Read the records in the last bytes of a file, oldest first; none if it cannot be read, as when it is missing.

    Torn lines are left out.
    """
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - num_bytes)
            file.seek(start)
            lines = file.readlines()
    except OSError:
        return []
    return [record for line in lines[1 if start else 0 :] if (record := _parse(line)) is not None]


def _failure(path: Path, error: OSError) -> HopescaleError:
    hint = "free some space, then repeat the command to continue from the last checkpoint"
    return HopescaleError(f"cannot write {path}: {error.strerror}", hint)


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    with path.open("rb") as file:
        torn = None
        for number, line in enumerate(file, start=1):
            if torn is not None:
                raise DataError(f"{path} line {torn} is not a record", "remove that line, or move the file away")
            record = _parse(line)
            if record is None:
                torn = number
            else:
                yield line, record


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if whole else None


def _cut(path: Path, last_step: int) -> None:
    """Keep the records up to a step. A kill leaves either the old file or the new one."""
    if not path.exists():
        return
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("wb") as file:
        file.writelines(line for line, record in _records(path) if record["step"] <= last_step)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
