"""What a run does about bad steps: it skips them, or goes back to a checkpoint from before them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hopescale.checkpoint.manager import newest_before
from hopescale.common.errors import ConfigError, DivergedError
from hopescale.config.plan import make_plan
from hopescale.train.state import TrainState

_HINT = (
    "the last step has changed no weight, and checkpoints are untouched; continue from an earlier one "
    "(--resume CHECKPOINT), or begin anew, with a lower optim.lr or optim.grad_clip"
)


class Recovery:
    """Follows `train.recovery` after steps that `LossWatch` has refused. All ranks call, and decide alike.

    Args:
        state: State of the run, whose `watch` has counted the bad step.
        checkpoints: Folder of the run's checkpoints.
        report: Function that takes each line meant for a person.
    """

    def __init__(self, state: TrainState, checkpoints: Path, report: Callable[[str], None]):
        self.state, self.config, self.checkpoints, self.report = state, state.config.train.recovery, checkpoints, report
        self._problem = ""

    def skip(self, problem: str) -> bool:
        """Return whether the run goes on behind a bad step, whose gradients are dropped; else with `go_back`.

        Args:
            problem: Step, what is wrong with it, and where its batch lies in the data.

        Raises:
            DivergedError: If it was one too many, and the run does not go back, or has done so too often.
        """
        in_a_row, skips = self.state.watch.in_a_row, self.config.skips
        if in_a_row > skips:
            if self.config.then == "stop":
                raise DivergedError(problem if not skips else f"{problem} (bad step {in_a_row} in a row)", _HINT)
            if self.state.returns == self.config.max_returns:
                raise DivergedError(f"{problem}; the run has gone back {self.state.returns} times before", _HINT)
            self._problem = problem
            return False
        self.report(f"skipped {problem} ({in_a_row} of at most {skips} in a row)")
        return True

    def go_back(self) -> None:
        """Continue from the newest checkpoint from before the bad steps, with a lower rate or other data.

        The last bad step is the one behind the state's.

        Raises:
            DivergedError: If there is no such checkpoint, or no such data.
        """
        state, then = self.state, self.config.then
        last_bad = state.step + 1
        first_bad = last_bad + 1 - state.watch.in_a_row
        checkpoint = state.mesh.control.broadcast_from_rank0(lambda: newest_before(self.checkpoints, first_bad))
        if checkpoint is None:
            why = f"there is no checkpoint from before step {first_bad} to go back to"
            raise DivergedError(f"{self._problem}; {why}", _HINT)
        refused, recovery = state.watch.refused, state.recovery()
        state.restore(checkpoint)
        state.watch.refused = refused
        state.load_recovery(recovery | {"returns": recovery["returns"] + 1})
        if then == "lower_rate":
            state.optimizer.rate_factor *= self.config.rate_factor
            how = f"all learning rates are {state.optimizer.rate_factor:.3g} of those in the schedule"
        else:
            state.passed_steps += last_bad - state.step
            self._check_data()
            how = f"with the batches behind those of step {last_bad}"
        what = f"{self._problem}\nwent back to {checkpoint.name}, {how}"
        self.report(f"{what} (return {state.returns} of at most {self.config.max_returns})")

    def _check_data(self) -> None:
        try:
            check_budget(self.state, self.state.passed_steps)
        except ConfigError as error:
            why = "; ".join(f"{problem.key}: {problem.message}" for problem in error.problems)
            raise DivergedError(f"{self._problem}; there is no other data: {why}", _HINT) from None


def check_budget(state: TrainState, passed_steps: int) -> None:
    """Refuse a run that would read a source too often, with the batches that it has passed over.

    Raises:
        ConfigError: Naming every such source.
    """
    plan = make_plan(state.config)
    state.data.check_budget(plan.total_sequences + passed_steps * plan.global_batch_size)
