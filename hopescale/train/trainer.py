"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch

from hopescale.checkpoint.manager import CheckpointManager
from hopescale.common.errors import CheckpointError, DataError, DivergedError, HopescaleError
from hopescale.config.plan import make_plan
from hopescale.data.loader import Batch, prefetched
from hopescale.engine import Engine, Gradients, make_passes
from hopescale.observe.console import format_step, format_validation
from hopescale.observe.throughput import Throughput, peak_memory_gib
from hopescale.parallel.control import Control
from hopescale.parallel.replicas import differing
from hopescale.parallel.traffic import Traffic
from hopescale.train.record import Record
from hopescale.train.state import TrainState
from hopescale.train.stop import StopRequest

T = TypeVar("T")


class Trainer:
    """Runs steps, validates, saves and records. On several ranks, each runs one, and all do the same at each step.

    Args:
        state: What is trained; its step tells where to begin.
        checkpoints: Where the state is saved.
        record: Where metrics go; None on other ranks than the first.
        throughput: Meter of speed.
        traffic: Counts what is sent.
        control: Where ranks agree.
        device: Where to compute.
        report: Takes each line meant for a person.
    """

    def __init__(
        self,
        state: TrainState,
        checkpoints: CheckpointManager,
        record: Record | None,
        throughput: Throughput,
        traffic: Traffic,
        control: Control,
        device: torch.device,
        report: Callable[[str], None],
    ):
        self.state, self.config, self.mesh = state, state.config, state.mesh
        self.plan, self.control = make_plan(state.config), control
        self.checkpoints, self.record, self.throughput, self.traffic = checkpoints, record, throughput, traffic
        self.device, self.report = device, report
        self.levels = state.levels
        passes = make_passes(state.slices, state.optimizer.backward, self.config.train.seq_len, device)
        self.engine = Engine(passes, state.optimizer, self.levels, traffic, device)
        sequences = self.config.train.micro_batch_size * self.mesh.dp_group.size()
        self.micro_batches = self.plan.global_batch_size // sequences
        self.saved = state.step
        self.sent, self.counted = traffic.bytes.copy(), state.step
        self.warm, self.failure = False, None

    def run(self, last_step: int, stop: StopRequest) -> str | None:
        """Train until `last_step` or until a signal asks any rank to stop, and save.

        Args:
            last_step: At most `train.steps`.
            stop: Read between steps.

        Returns:
            The signal's name if it ended the run early, else None.

        Raises:
            DivergedError: If a loss or gradient must not reach the weights, or replicas differ; nothing is saved then.
            DataError: If a batch cannot be read; what was trained until then is saved.
            CheckpointError: If the state could not be saved.
        """
        batches = self._batches(last_step)
        try:
            if self.state.step == 0:
                self._record(self._validate())
            while True:
                begin = time.perf_counter()
                micro = self._own(lambda: list(islice(batches, self.micro_batches)))
                reason = self.control.agree(stop.reason, self.failure)
                if reason is not None or self.state.step == last_step:
                    break
                values = self._step(micro, begin)
                self._record(values | (self._validate() if self._validation_due() else {}))
                if self.checkpoints.due(self.state.step, self.config.train.steps):
                    self._save()
                self._own(self.checkpoints.poll)
            self._finish()
        except HopescaleError as error:
            if isinstance(error, DivergedError):  # found by all ranks at once
                error.repeated = not self.control.is_first
            self._finish_after(error)
            raise
        finally:
            batches.close()
        return reason if self.state.step < last_step else None

    def _own(self, work: Callable[[], T]) -> T | None:
        """Do what this rank may fail in alone; the failure is kept until all ranks learn of it."""
        try:
            return work()
        except HopescaleError as error:
            self.failure = self.failure or error
            return None

    def _batches(self, last_step: int) -> Iterator[Batch]:
        """Micro batches of this replica from the present step on. What all replicas read depends on the step alone."""
        size, micro = self.plan.global_batch_size, self.config.train.micro_batch_size
        replicas, replica = self.mesh.dp_group.size(), self.mesh.dp_group.rank()
        starts = range(self.state.step * size + replica * micro, last_step * size, micro * replicas)
        indices = (range(start, start + micro) for start in starts)
        return prefetched(self.state.data, indices, self.config.data.prefetch * self.micro_batches)

    def _step(self, micro: list[Batch], begin: float) -> dict[str, float]:
        """Take one step; return what is to be recorded of it, nothing on most steps.

        Args:
            micro: Its micro batches.
            begin: When waiting for them began.
        """
        waited = time.perf_counter() - begin
        step = self.state.step + 1
        logged = step % self.config.log.every == 0 or step == self.config.train.steps
        gradients = self.engine.gradients(step, micro, probe=logged)
        # A bad gradient that a slow level gathers would be saved with it, and only be seen when the level is due.
        worst = gradients.grad_norm if math.isfinite(gradients.waiting_norm) else gradients.waiting_norm
        self.state.watch.check(step, gradients.loss, worst, lambda: self._where(step))
        changes = self.engine.update(step, gradients, measure=logged)
        self.state.step = step
        self._check_replicas()
        self.throughput.add(self.config.train.global_batch_tokens, time.perf_counter() - begin, waited)
        if not self.warm:
            self.mesh.set_timeout(timedelta(seconds=self.config.parallel.timeout_s))
            self.warm = True
        if not logged:
            return self._values(gradients, changes) if changes else {}
        values = self._values(gradients, changes) | self._traffic() | self.throughput.snapshot()
        values |= self._over_ranks(gradients)
        self.report(self._line(gradients, values))
        return values

    def _where(self, step: int) -> str:
        size = self.plan.global_batch_size
        first, last = (step - 1) * size, step * size - 1
        return f"samples {first} to {last}, from {self.state.data.locate(first)} to {self.state.data.locate(last)}"

    def _check_replicas(self) -> None:
        """Compare the weights of the replicas, now and then."""
        every = self.config.train.replica_check_every
        copies = self.mesh.dp_group.size() > 1 and self.config.parallel.zero < 3
        if every is None or self.state.step % every or not copies:
            return
        with self.traffic.paused():
            bad = differing(self.state.parameters, self.mesh.dp_group)
        names = sorted({name for of_rank in self.control.gather(bad) for name in of_rank})
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            hint = "a device or its memory is at fault, or ranks run different code; continue from the last checkpoint"
            raise DivergedError(f"after step {self.state.step} the replicas hold different weights: {shown}", hint)

    def _values(self, gradients: Gradients, changes: dict[str, float]) -> dict[str, float]:
        step, optimizer = self.state.step, self.state.optimizer
        values = {"loss": gradients.loss, "grad_norm": gradients.grad_norm}
        values |= {f"lr/{group}": rate for group, rate in optimizer.rates(step).items()}
        for level, norm in gradients.level_norms.items():
            values[f"level/{level}/grad_norm"] = norm
            values[f"level/{level}/updates"] = optimizer.cadences[self.levels[level][0]].updates(step)
            if self.mesh.dp_group.size() > 1 and self.config.parallel.zero < 2:
                values[f"level/{level}/bytes"] = gradients.level_bytes[level]
        return values | {f"level/{level}/update_rms": change for level, change in changes.items()}

    def _traffic(self) -> dict[str, float]:
        """Return what this rank has sent per step since the last record, in all and by axis."""
        if self.control.num_ranks == 1:
            return {}
        steps = self.state.step - self.counted
        sent = {axis: count - self.sent[axis] for axis, count in self.traffic.bytes.items()}
        self.sent, self.counted = self.traffic.bytes.copy(), self.state.step
        axes = {f"comm/{axis}/bytes_per_step": count / steps for axis, count in sent.items()}
        return {"comm/bytes_per_step": sum(sent.values()) / steps} | axes

    def _over_ranks(self, gradients: Gradients) -> dict[str, float]:
        """Return what each rank has seen of its own: the mean of statistics of the memories, the highest memory."""
        probe = {name: value.item() for name, value in gradients.probe.items()}
        ranks = self.control.gather((probe, peak_memory_gib(self.device)))
        names = dict.fromkeys(name for seen, _ in ranks for name in seen)
        values = {name: [seen[name] for seen, _ in ranks if name in seen] for name in names}
        means = {name: sum(seen) / len(seen) for name, seen in values.items()}
        return {"device_memory/peak_gib": max(peak for _, peak in ranks)} | means

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
            with self.traffic.paused():
                loss = values[f"val/{name}/loss"] = self.engine.evaluate(batches)
            if (bits := data.bits_per_byte(name, loss)) is not None:
                values[f"val/{name}/bits_per_byte"] = bits
            self.report(
                format_validation(self.state.step, self.config.train.steps, name, loss=loss, bits_per_byte=bits)
            )
        return values

    def _record(self, values: dict[str, float]) -> None:
        if values and self.record is not None:
            self._own(lambda: self.record.log(self.state.step, self.state.tokens_seen, values))

    def _finish(self) -> None:
        if self.saved != self.state.step:
            self._save()
        self.checkpoints.wait()

    def _finish_after(self, error: HopescaleError) -> None:
        """Let the save in flight complete; a failure of its own must not hide the first one."""
        try:
            if self.control.verdict == DataError.exit_code:
                self._finish()
            self.checkpoints.wait()
        except CheckpointError as second:
            self.report(str(second))

    def _save(self) -> None:
        with self.traffic.paused():
            self.checkpoints.save(self.state.step, self.state.tensors(), self.state.manifest())
        self.saved = self.state.step
