"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
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
from hopescale.train.launched import KnownStep, LaunchedStep
from hopescale.train.metrics import StepMetrics
from hopescale.train.profile import StepProfiler
from hopescale.train.recovery import Recovery
from hopescale.train.replicas import check_replicas
from hopescale.train.samples import SampleWriter
from hopescale.train.state import TrainState
from hopescale.train.stop import StopRequest
from hopescale.train.upcoming import Upcoming

T = TypeVar("T")


class Trainer:
    """Runs steps, validates, saves and records. On several ranks, each runs one, and all do the same at each step.

    The host learns of a step when it has given the next one's passes to the device, unless something depends on it
    at once (`_must_know`): the device itself sees to it that a bad step changes nothing.

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
        self._has_short_timeout, self._is_asked = False, True
        self._stop = StopRequest()
        self._upcoming = Upcoming((batch for batch in ()), 0)
        self._late: LaunchedStep | None = None

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
        self._stop = stop
        try:
            if self.state.step == 0:
                self.log(self.validate())
            begin = time.perf_counter()
            signal = self._begin_to_read(last_step)
            while signal is None and self.state.step < last_step:
                metrics = self.train_step(begin, last_step)
                if metrics is not None:
                    metrics |= self.validate_if_due()
                    self.log(metrics)
                    self.save_if_due()
                    begin, reason = time.perf_counter(), stop.reason
                    if not self._agrees(reason, last_step):
                        continue
                    if self._finish():
                        signal = self.control.agree(reason, self._hindrance)
                        continue
                self._upcoming.close()
                self._go_back()
                begin = time.perf_counter()
                signal = self._begin_to_read(last_step)
            self._save_at_end()
            self._drop_memory()
        except HopescaleError as error:
            if isinstance(error, DivergedError):  # found by all ranks at once
                error.repeated = not self.control.is_first
            if self._save_after() or isinstance(error, DivergedError):
                self._drop_memory()
            raise
        finally:
            self._upcoming.close()
        return signal if self.state.step < last_step else None

    def _begin_to_read(self, last_step: int) -> str | None:
        """Read the micro batches of the next step and agree on going on, where no step carries the flags."""
        self._upcoming = Upcoming(self._prefetched_batches(last_step), self.plan.grad_accumulation)
        self._look_ahead(steps=1)
        self._is_asked = True  # what is read ahead in the next step may be asked at once
        return self.control.agree(self._stop.reason, self._hindrance)

    def _look_ahead(self, steps: int = 2) -> bool:
        """Read the micro batches of steps ahead; tell whether this rank has something to say to the others.

        They hear of it when all have given one step more to the device, which has its batches by then.
        """
        self._upcoming.read(steps if self.control.num_ranks > 1 else 1)
        return any(each is not None for each in (self._stop.reason, self.failure, self._upcoming.failure))

    @property
    def _hindrance(self) -> HopescaleError | None:
        """Error that keeps this rank from the next step: of its own, or that the step has no micro batches."""
        return self.failure or self._upcoming.lacks_next

    def _agrees(self, reason: str | None, last_step: int) -> bool:
        """Tell whether the ranks agree on going on after the present step: all of them, or one alone that stops."""
        asks = self._is_asked if self.control.num_ranks > 1 else reason is not None or self._hindrance is not None
        return asks or self.state.step == last_step

    def train_step(self, begin: float, last_step: int) -> dict[str, float] | None:
        """Take one step with the batches at hand and read ahead; a bad one changes nothing.

        Returns:
            Its metrics, none on steps that are not recorded and on those that are not known yet; None if there was one
            bad step too many, and the run is to go back.

        Args:
            begin: Time at which the step began.
            last_step: Step with which the run ends.
        """
        step = self.state.step + 1
        is_recorded = step % self.config.log.every == 0 or step == self.config.train.steps
        computed = self.engine.gradients(step, self._upcoming.take(), probe=is_recorded, ask=self._look_ahead)
        if not self._finish():
            return None
        changes = None
        if self.engine.is_gated:
            changes = self.engine.update(step, computed, measure=is_recorded, limits=self.state.watch.limits())
        taken, judged = LaunchedStep(step, computed, changes, is_recorded), None
        self.state.step = step
        if not self._must_know(is_recorded, last_step):
            self._late = taken
        elif (judged := self._judge(taken)) is None:
            return None
        self._check_replicas_if_due()
        self.metrics.add_step(time.perf_counter() - begin, self._upcoming.seconds)
        self._shorten_timeout()
        if self.profiler is not None:
            self.profiler.step(step)
        return {} if judged is None else self._metrics_of(judged, is_recorded)

    def _must_know(self, is_recorded: bool, last_step: int) -> bool:
        """Tell whether the host waits for the present step's loss and norms at once, alike on all ranks."""
        step, steps = self.state.step, self.config.train.steps
        is_saved = self.checkpoints.must_keep(step) or self.checkpoints.due(step, steps)
        is_kept = self.memory is not None and self.memory.due(step)
        is_compared = self._replica_check_is_due()
        is_used = is_recorded or is_saved or is_kept or is_compared or self._validation_is_due() or step == last_step
        return is_used or self._is_asked or not self.engine.is_gated

    def _finish(self) -> bool:
        """Judge and record the step that is not known yet, if there is one; tell whether the run goes on behind it."""
        taken, self._late = self._late, None
        judged = None if taken is None else self._judge(taken)
        if judged is not None:
            self.log(self._metrics_of(judged, is_recorded=False))
        return taken is None or judged is not None

    def _judge(self, taken: LaunchedStep) -> KnownStep | None:
        """Learn how the present step was, and update if that has waited; None if the run is to go back before it."""
        step, gradients, optimizer = taken.step, taken.computed.read(), self.state.optimizer
        self._is_asked = gradients.is_asked
        # A bad gradient that a slow level gathers would be saved with it, and only be seen when the level is due.
        problem = self.state.watch.judge(gradients.loss, gradients.grad_norm, gradients.waiting_norm)
        if problem is None:
            changes = taken.changes
            if changes is None:
                changes = self.engine.update(step, taken.computed, measure=taken.is_recorded)
            return KnownStep(gradients, changes.read(), None)
        if taken.changes is None:
            optimizer.discard(step)
        else:
            optimizer.take_back(step)
        self.state.step = step - 1
        if not self.recovery.skip(f"step {step}: {problem}; batch: {self._samples_of(step)}"):
            optimizer.discard(step)
            return None
        self.state.step = step
        return KnownStep(replace(gradients, level_norms={}), {}, problem)

    def _metrics_of(self, judged: KnownStep, is_recorded: bool) -> dict[str, float]:
        """Return the metrics of the present step, none if it is not recorded."""
        gradients, changes, problem = judged.gradients, judged.changes, judged.problem
        metrics = self.metrics.of_updates(gradients, changes) if is_recorded or changes or problem else {}
        if problem is not None:
            metrics["steps_skipped"] = self.state.watch.refused
        if is_recorded:
            metrics |= self.metrics.of_interval(gradients)
            self.report(self.metrics.line(gradients, metrics))
            if self.record is not None:
                self.distributions = self.metrics.distributions(gradients)
        return metrics

    def _validation_is_due(self) -> bool:
        every = self.config.train.validation.every
        return every is not None and (self.state.step % every == 0 or self.state.step == self.config.train.steps)

    def validate_if_due(self) -> dict[str, float]:
        """Validate at the steps that `train.validation` names, and at the last one."""
        return self.validate() if self._validation_is_due() else {}

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

    def _replica_check_is_due(self) -> bool:
        every = self.config.train.replica_check_every
        are_copies = self.mesh.dp_group.size() > 1 and self.config.parallel.stage < 3
        return every is not None and self.state.step % every == 0 and are_copies

    def _check_replicas_if_due(self) -> None:
        if self._replica_check_is_due():
            self.state.optimizer.settle()
            whole, shares = self.state.optimizer.copies()
            check_replicas(whole, self.mesh, self.state.step, shares)

    def _shorten_timeout(self) -> None:
        """After the first step, which may compile, wait for other ranks no longer than `parallel.timeout_s`."""
        if not self._has_short_timeout:
            self.mesh.set_timeout(timedelta(seconds=self.config.parallel.timeout_s))
            self._has_short_timeout = True
