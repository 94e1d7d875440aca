"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from hopescale.checkpoint.manager import CheckpointManager
from hopescale.checkpoint.memory import MemoryCheckpoints
from hopescale.common.errors import CheckpointError, DataError, DivergedError, HopescaleError
from hopescale.config.layout import Layout
from hopescale.config.plan import make_plan
from hopescale.data.loader import Batch, Share, prefetched
from hopescale.engine import Engine, make_passes
from hopescale.observe.console import format_sample, format_validation
from hopescale.train.folder import Record
from hopescale.train.metrics import StepMetrics
from hopescale.train.profile import StepProfiler
from hopescale.train.recovery import Recovery
from hopescale.train.replicas import check_replicas
from hopescale.train.samples import SampleWriter
from hopescale.train.state import TrainState
from hopescale.train.stop import StopRequest

T = TypeVar("T")


class Trainer:
    """Runs steps, validates, saves and records. On several ranks, each runs one, and all do the same at each step.

    Args:
        state: State to train; its step tells where to begin.
        layout: Degrees of parallelism.
        checkpoints: Manager that saves the state.
        record: Record of the metrics; None on other ranks than the first.
        device: Device of this rank.
        report: Function that takes each line meant for a person.
        profiler: Profiler that is told of each step; None records none.
        memory: Checkpoints in memory; None keeps none.
    """

    def __init__(
        self,
        state: TrainState,
        layout: Layout,
        checkpoints: CheckpointManager,
        record: Record | None,
        device: torch.device,
        report: Callable[[str], None],
        profiler: StepProfiler | None = None,
        memory: MemoryCheckpoints | None = None,
    ):
        self.profiler, self.memory = profiler, memory
        self.state, self.config, self.mesh = state, state.config, state.mesh
        self.control, self.plan = state.mesh.control, make_plan(state.config, layout)
        self.layout, self.device = layout, device
        self.checkpoints, self.record, self.report = checkpoints, record, report
        train, cp_group = self.config.train, self.mesh.cp_group
        self.share = Share(cp_group.rank(), cp_group.size(), train.segments)
        passes = make_passes(state.slices, state.optimizer.backward, train.seq_len, device, segments=train.segments)
        self.engine = Engine(passes, state.optimizer, state.levels, device, self.share, cadences=state.cadences)
        self.metrics = StepMetrics(state, layout, device)
        self.samples = SampleWriter(self.config, layout, state.data.tokenizer)
        self.recovery = Recovery(state, checkpoints.folder, report)
        self.saved_step = state.step
        self.distributions: dict[str, Tensor] = {}
        self.failure: HopescaleError | None = None
        self._has_short_timeout = self._is_asked = False
        self._stop = StopRequest()
        self._batches: Iterator[Batch] = iter(())
        self._upcoming: list[Batch] | None = None
        self._data_seconds = 0.0

    def run(self, last_step: int, stop: StopRequest) -> str | None:
        """Train until `last_step` or until a signal asks any rank to stop, and save.

        Args:
            last_step: Step to end after, at most `train.steps`.
            stop: Request to stop, read between steps.

        Returns:
            The signal's name if it ended the run early, else None.

        Raises:
            DivergedError: If there were more bad steps than `train.recovery` allows, or replicas differ; nothing is
                saved then.
            DataError: If a batch cannot be read; what was trained until then is saved.
            CheckpointError: If the state could not be saved.
        """
        self._stop, self._batches = stop, self._prefetched_batches(last_step)
        try:
            if self.state.step == 0:
                self.log(self.validate())
            begin = time.perf_counter()
            signal = self._look_ahead_and_agree()
            while signal is None and self.state.step < last_step:
                metrics = self.train_step(begin)
                if metrics is None:
                    self._batches.close()
                    self._go_back()
                    self._batches = self._prefetched_batches(last_step)
                    begin = time.perf_counter()
                    signal = self._look_ahead_and_agree()
                    continue
                metrics |= self.validate_if_due()
                self.log(metrics)
                self.save_if_due()
                begin = time.perf_counter()
                if self._is_asked or self.control.num_ranks == 1 or self.state.step == last_step:
                    signal = self.control.agree(stop.reason, self.failure)
            self._save_at_end()
            self._drop_memory()
        except HopescaleError as error:
            if isinstance(error, DivergedError):  # found by all ranks at once
                error.repeated = not self.control.is_first
            if self._save_after() or isinstance(error, DivergedError):
                self._drop_memory()
            raise
        finally:
            self._batches.close()
        return signal if self.state.step < last_step else None

    def _look_ahead(self) -> bool:
        """Read the micro batches of the next step; tell whether this rank has something to say to the others.

        Fewer batches are left where the run ends, and none if they cannot be read.
        """
        begin = time.perf_counter()
        self._upcoming = self._defer_failure(lambda: list(islice(self._batches, self.plan.grad_accumulation)))
        self._data_seconds = time.perf_counter() - begin
        return self._stop.reason is not None or self.failure is not None

    def _look_ahead_and_agree(self) -> str | None:
        """Read the micro batches of the next step and agree on going on, where no step carries the flags."""
        self._look_ahead()
        return self.control.agree(self._stop.reason, self.failure)

    def train_step(self, begin: float) -> dict[str, float] | None:
        """Take one step with the batches at hand and read those of the next one, or skip it if it is bad.

        Returns:
            Its metrics, none on steps that are not recorded; None if it was one bad step too many, and the run is to go
            back.

        Args:
            begin: Time at which the step began.
        """
        step = self.state.step + 1
        is_recorded = step % self.config.log.every == 0 or step == self.config.train.steps
        gradients = self.engine.gradients(step, self._upcoming, probe=is_recorded, ask=self._look_ahead)
        self._is_asked = gradients.is_asked
        # A bad gradient that a slow level gathers would be saved with it, and only be seen when the level is due.
        problem = self.state.watch.judge(gradients.loss, gradients.grad_norm, gradients.waiting_norm)
        if problem is None:
            changes = self.engine.update(step, gradients, measure=is_recorded)
        elif self.recovery.skip(f"step {step}: {problem}; batch: {self._samples_of(step)}"):
            gradients, changes = replace(gradients, level_norms={}), {}
        else:
            return None
        self.state.step = step
        self._check_replicas_if_due()
        self.metrics.add_step(time.perf_counter() - begin, self._data_seconds)
        self._shorten_timeout()
        if self.profiler is not None:
            self.profiler.step(step)
        metrics = self.metrics.of_updates(gradients, changes) if is_recorded or changes or problem else {}
        if problem is not None:
            metrics["steps_skipped"] = self.state.watch.refused
        if is_recorded:
            metrics |= self.metrics.of_interval(gradients)
            self.report(self.metrics.line(gradients, metrics))
            if self.record is not None:
                self.distributions = self.metrics.distributions(gradients)
        return metrics

    def validate_if_due(self) -> dict[str, float]:
        """Validate at the steps that `train.validation` names, and at the last one."""
        every = self.config.train.validation.every
        is_due = every is not None and (self.state.step % every == 0 or self.state.step == self.config.train.steps)
        return self.validate() if is_due else {}

    def validate(self) -> dict[str, float]:
        """Measure the held-out loss of every source that has held-out samples, and write samples."""
        validation, data, metrics = self.config.train.validation, self.state.data, {}
        for name in data.validation_sets if validation.every is not None else ():
            rows = data.validation(name, validation.tokens, self.config.train.micro_batch_size)
            batches = self.control.all_ranks_or_raise(lambda rows=rows: list(rows))
            loss = metrics[f"val/{name}/loss"] = self.engine.evaluate(batches)
            if (bits := data.bits_per_byte(name, loss)) is not None:
                metrics[f"val/{name}/bits_per_byte"] = bits
            self.report(
                format_validation(self.state.step, self.config.train.steps, name, loss=loss, bits_per_byte=bits)
            )
        if self.record is not None and validation.every is not None:
            self._write_samples(self.record)
        return metrics

    def _write_samples(self, record: Record) -> None:
        self.state.optimizer.settle()
        texts = self.samples.write(self.state.slices[0])
        for name, text in texts.items():
            self.report(format_sample(self.state.step, self.config.train.steps, name, text))
        if texts:
            self._defer_failure(lambda: record.log_texts(self.state.step, texts))

    def log(self, metrics: dict[str, float]) -> None:
        """Record metrics of the present step, if there are any."""
        if metrics and self.record is not None:
            what = (self.state.step, self.state.tokens_seen, metrics, self.distributions)
            self._defer_failure(lambda: self.record.log(*what))
        self.distributions = {}

    def save_if_due(self) -> None:
        """Save the state at the steps that `checkpoint` names; notice a failure of the save under way.

        Not after a bad step, unless `keep_at` names it: other saves push out older ones, and the run may have to go
        back to those.
        """
        step, is_good = self.state.step, self.state.watch.in_a_row == 0
        if self.checkpoints.must_keep(step) or (is_good and self.checkpoints.due(step, self.config.train.steps)):
            self.save()
        if is_good and self.memory is not None and self.memory.due(step):
            self.memory.save(step, self.state.own_tensors(), self.state.manifest())
        self._defer_failure(self.checkpoints.poll)

    def _go_back(self) -> None:
        """Continue from a checkpoint from before the last bad steps, and save there what the run has changed.

        One that `keep_at` names stays as it is: other runs that branch off there have the rate and data of before.
        """
        self.checkpoints.wait()
        self.recovery.go_back()
        if self.memory is not None:
            self.memory.renew()
        if self.checkpoints.must_keep(self.state.step):
            self.saved_step = self.state.step
        else:
            self.save()
        self.metrics = StepMetrics(self.state, self.layout, self.device)
        if self.record is not None:
            self._defer_failure(lambda: self.record.go_back(self.state.step))

    def save(self) -> None:
        """Save the state to disk."""
        self.checkpoints.save(self.state.step, self.state.tensors(), self.state.manifest())
        self.saved_step = self.state.step

    def _drop_memory(self) -> None:
        if self.memory is not None:
            self.memory.clear()

    def _save_at_end(self) -> None:
        if self.saved_step != self.state.step:
            self.save()
        self.checkpoints.wait()

    def _save_after(self) -> bool:
        """Let the save in flight complete, after a failure that one of its own must not hide.

        Returns:
            Whether the present step is on disk.
        """
        try:
            if self.control.verdict == DataError.exit_code:
                self._save_at_end()
            self.checkpoints.wait()
        except CheckpointError as second:
            self.report(str(second))
            return False
        return self.saved_step == self.state.step

    def _defer_failure(self, work: Callable[[], T]) -> T | None:
        """Do what this rank may fail in alone; the failure waits until all ranks learn of it."""
        try:
            return work()
        except HopescaleError as error:
            self.failure = self.failure or error
            return None

    def _prefetched_batches(self, last_step: int) -> Iterator[Batch]:
        """Return the micro batches of this replica from the present step on; the step alone decides what they are."""
        size, rows = self.plan.global_batch_size, self.config.train.micro_batch_size
        replicas, replica = self.mesh.num_replicas, self.mesh.replica
        first, end = ((step + self.state.passed_steps) * size for step in (self.state.step, last_step))
        starts = range(first + replica * rows, end, rows * replicas)
        indices = (range(start, start + rows) for start in starts)
        depth, pinned = self.config.data.prefetch * self.plan.grad_accumulation, self.engine.device.type == "cuda"
        return prefetched(self.state.data, indices, depth, pinned=pinned, share=self.share)

    def _samples_of(self, step: int) -> str:
        size, read = self.plan.global_batch_size, step + self.state.passed_steps
        first, last = (read - 1) * size, read * size - 1
        return f"samples {first} to {last}, from {self.state.data.locate(first)} to {self.state.data.locate(last)}"

    def _check_replicas_if_due(self) -> None:
        every = self.config.train.replica_check_every
        are_copies = self.mesh.dp_group.size() > 1 and self.config.parallel.stage < 3
        if every is not None and self.state.step % every == 0 and are_copies:
            self.state.optimizer.settle()
            whole, shares = self.state.optimizer.copies()
            check_replicas(whole, self.mesh, self.state.step, shares)

    def _shorten_timeout(self) -> None:
        """After the first step, which may compile, wait for other ranks no longer than `parallel.timeout_s`."""
        if not self._has_short_timeout:
            self.mesh.set_timeout(timedelta(seconds=self.config.parallel.timeout_s))
            self._has_short_timeout = True
