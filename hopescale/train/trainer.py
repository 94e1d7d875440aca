"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from itertools import islice

import torch

from hopescale.checkpoint.manager import CheckpointManager
from hopescale.common.errors import CheckpointError, DataError, HopescaleError
from hopescale.config.plan import make_plan
from hopescale.data.loader import Batch, prefetched
from hopescale.engine import Engine, Gradients
from hopescale.observe.console import format_step, format_validation
from hopescale.observe.throughput import Throughput, peak_memory_gib
from hopescale.train.record import Record
from hopescale.train.state import TrainState
from hopescale.train.stop import StopRequest


class Trainer:
    """Runs steps, validates, saves and records.

    Args:
        state: What is trained; its step tells where to begin.
        checkpoints: Where the state is saved.
        record: Where metrics go.
        throughput: Meter of speed.
        device: Where to compute.
        report: Takes each line meant for a person.
    """

    def __init__(
        self,
        state: TrainState,
        checkpoints: CheckpointManager,
        record: Record,
        throughput: Throughput,
        device: torch.device,
        report: Callable[[str], None],
    ):
        self.state, self.config, self.plan = state, state.config, make_plan(state.config)
        self.checkpoints, self.record, self.throughput = checkpoints, record, throughput
        self.device, self.report = device, report
        self.levels = state.model.level_parameters()
        self.engine = Engine(state.model, state.optimizer, self.levels, device)
        self.saved = state.step

    def run(self, last_step: int, stop: StopRequest) -> str | None:
        """Train until `last_step` or until a signal asks to stop, and save.

        Args:
            last_step: At most `train.steps`.
            stop: Read between steps.

        Returns:
            The signal's name if it ended the run early, else None.

        Raises:
            DivergedError: If a loss or gradient must not reach the weights; nothing is saved then.
            DataError: If a batch cannot be read; what was trained until then is saved.
            CheckpointError: If the state could not be saved.
        """
        batches = self._batches(last_step)
        try:
            if self.state.step == 0:
                self._record(self._validate())
            while self.state.step < last_step and stop.reason is None:
                self._record(self._step(batches) | (self._validate() if self._validation_due() else {}))
                if self.checkpoints.due(self.state.step, self.config.train.steps):
                    self._save()
                self.checkpoints.poll()
            self._finish()
        except HopescaleError as error:
            self._finish_after(error)
            raise
        finally:
            batches.close()
        return stop.reason if self.state.step < last_step else None

    def _batches(self, last_step: int) -> Iterator[Batch]:
        """Micro batches from the present step on. Which samples they hold depends on the step alone."""
        size, micro = self.plan.global_batch_size, self.config.train.micro_batch_size
        starts = range(self.state.step * size, last_step * size, micro)
        indices = (range(start, start + micro) for start in starts)
        return prefetched(self.state.data, indices, self.config.data.prefetch * self.plan.grad_accumulation)

    def _step(self, batches: Iterator[Batch]) -> dict[str, float]:
        """Take one step; return what is to be recorded of it, nothing on most steps."""
        begin = time.perf_counter()
        step = self.state.step + 1
        micro = list(islice(batches, self.plan.grad_accumulation))
        waited = time.perf_counter() - begin
        logged = step % self.config.log.every == 0 or step == self.config.train.steps
        gradients = self.engine.gradients(step, micro, probe=logged)
        norm, waiting = gradients.grad_norm.item(), gradients.waiting_norm.item()
        # A bad gradient that a slow level gathers would be saved with it, and only be seen when the level is due.
        worst = norm if math.isfinite(waiting) else waiting
        self.state.watch.check(step, gradients.loss, worst, lambda: self._where(step))
        changes = self.engine.update(step, gradients, measure=logged)
        self.state.step = step
        self.throughput.add(self.config.train.global_batch_tokens, time.perf_counter() - begin, waited)
        if not logged:
            return self._values(gradients, changes) if changes else {}
        values = self._values(gradients, changes)
        values |= self.throughput.snapshot() | {"device_memory/peak_gib": peak_memory_gib(self.device)}
        self.report(self._line(gradients, values))
        return values

    def _where(self, step: int) -> str:
        size = self.plan.global_batch_size
        first, last = (step - 1) * size, step * size - 1
        return f"samples {first} to {last}, from {self.state.data.locate(first)} to {self.state.data.locate(last)}"

    def _values(self, gradients: Gradients, changes: dict[str, float]) -> dict[str, float]:
        step, optimizer = self.state.step, self.state.optimizer
        values = {"loss": gradients.loss, "grad_norm": gradients.grad_norm.item()}
        values |= {f"lr/{group}": rate for group, rate in optimizer.rates(step).items()}
        for level, norm in gradients.level_norms.items():
            values[f"level/{level}/grad_norm"] = norm.item()
            values[f"level/{level}/updates"] = optimizer.accumulators[self.levels[level][0]].cadence.updates(step)
        values |= {f"level/{level}/update_rms": change for level, change in changes.items()}
        return values | {name: value.item() for name, value in gradients.probe.items()}

    def _line(self, gradients: Gradients, values: dict[str, float]) -> str:
        step, steps = self.state.step, self.config.train.steps
        return format_step(
            step,
            steps,
            loss=gradients.loss,
            grad_norm=values["grad_norm"],
            lr=max(self.state.optimizer.rates(step).values()),
            memory_gib=values["device_memory/peak_gib"],
            tps=values["tps"],
            mfu=values.get("mfu"),
            eta_s=(steps - step) * values["time/step_s"],
            due=list(gradients.level_norms),
        )

    def _validation_due(self) -> bool:
        every = self.config.train.validation.every
        return every is not None and (self.state.step % every == 0 or self.state.step == self.config.train.steps)

    def _validate(self) -> dict[str, float]:
        """Measure the held-out loss of every source that has held-out samples."""
        validation, data, values = self.config.train.validation, self.state.data, {}
        for name in data.validation_sets if validation.every is not None else ():
            batches = data.validation(name, validation.tokens, self.config.train.micro_batch_size)
            loss = values[f"val/{name}/loss"] = self.engine.evaluate(batches)
            ratio, bits = data.bytes_per_token(name), None
            if ratio is not None:
                bits = values[f"val/{name}/bits_per_byte"] = loss / math.log(2) / ratio
            self.report(
                format_validation(self.state.step, self.config.train.steps, name, loss=loss, bits_per_byte=bits)
            )
        return values

    def _record(self, values: dict[str, float]) -> None:
        if values:
            self.record.log(self.state.step, self.state.tokens_seen, values)

    def _finish(self) -> None:
        if self.saved != self.state.step:
            self._save()
        self.checkpoints.wait()

    def _finish_after(self, error: HopescaleError) -> None:
        """Let the save in flight complete; a failure of its own must not hide the first one."""
        try:
            if isinstance(error, DataError):
                self._finish()
            self.checkpoints.wait()
        except CheckpointError as second:
            self.report(str(second))

    def _save(self) -> None:
        self.checkpoints.save(self.state.step, self.state.tensors(), self.state.manifest())
        self.saved = self.state.step
