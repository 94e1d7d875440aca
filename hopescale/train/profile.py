"""A trace of some steps: the work of processor and device, and on a GPU the contents of its memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

FIRST = 2
"""Steps of a start before the first one that is recorded: the first one compiles and makes room."""

_LONGEST = 40
_EVENTS = 1_000_000


class StepProfiler:
    """Records steps of the first rank, from the third of this start on; a context manager.

    Writes `trace-<step>.json.gz` for Perfetto or `chrome://tracing`, `operations-<step>.txt`, the operations that took
    longest, and on a GPU `memory-<step>.pickle` for pytorch.org/memory_viz; the step is the last that was recorded.

    Args:
        folder: Folder to write, made if missing.
        steps: Number of steps to record.
        device: Device of the run.
        report: Function that takes each line meant for a person.
    """

    def __init__(self, folder: Path, steps: int, device: torch.device, report: Callable[[str], None]):
        self.folder, self.steps, self.device, self.report = folder, steps, device, report
        self._step = self._count = 0
        self._written = False
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        when = schedule(wait=FIRST - 1, warmup=1, active=steps, repeat=1)
        self._profiler = profile(
            activities=activities, schedule=when, on_trace_ready=self._write, record_shapes=True, profile_memory=True
        )

    def __enter__(self) -> StepProfiler:
        self._profiler.__enter__()
        if self.device.type == "cuda":
            torch.cuda.memory._record_memory_history(max_entries=_EVENTS)
        return self

    def __exit__(self, *error: object) -> None:
        self._profiler.__exit__(*error)
        if self.device.type == "cuda":
            torch.cuda.memory._record_memory_history(enabled=None)
        if not self._written:
            self.report("note: --profile wrote nothing: the run ended before its third step")

    def step(self, step: int) -> None:
        """Note that a step has ended."""
        self._step, self._count = step, self._count + 1
        self._profiler.step()

    def _write(self, done: profile) -> None:
        recorded = self._count - FIRST
        if recorded < 1:
            return
        try:
            self._write_files(done)
        except (OSError, RuntimeError) as error:
            self.report(f"note: cannot write the profile in {self.folder}: {error}")
            return
        self.report(f"profile of the last {recorded} steps: {self.folder}")

    def _write_files(self, done: profile) -> None:
        self._written = True
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"trace-{self._step}.json.gz"
        done.export_chrome_trace(str(trace))
        by = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = done.key_averages().table(sort_by=by, row_limit=_LONGEST)
        (self.folder / f"operations-{self._step}.txt").write_text(table, encoding="utf-8")
        if self.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory-{self._step}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
