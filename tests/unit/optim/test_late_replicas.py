"""Nobody waits at a sum with a lag for a replica that is late: all have waited for it in the sums of every step.

Rank 0 takes steps without a model and writes down which exchanges it begins and waits for. Then a simulator lets
replicas do that together, each with passes and exchanges of random times. A rule that lets a replica, or a whole sum,
miss an update and join the next period would at best save what never waiting for these sums saves.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest

from hopescale.config.load import load_recipe
from tests.support.many_ranks import Rank, noted

REPLICAS, STEPS, PERIOD = 8, 24, 4
Program = list[tuple[str, int]]


def program_of(zero: int, lag: int) -> tuple[Program, set[int]]:
    """Return the order of work, begun exchanges and awaited ones, and which are awaited in a later step."""
    level = f"model.cms.levels.slow={{update_every_steps: {PERIOD}, lag: {lag}}}"
    rank, train, late = Rank(load_recipe("debug", [f"parallel.zero={zero}", level]).config, REPLICAS), Rank.train, set()
    begun: set[int] = set()
    with noted([*rank.parameters.values()]) as found:

        def working(*arguments: Any) -> Any:
            found.order.append(("work", step))
            return train(*arguments)

        with patch.object(Rank, "train", working):
            for step in range(1, STEPS + 1):
                first = len(found.order)
                computed = rank.engine.gradients(step, [])
                rank.optimizer.step(step, computed.grad_norm)
                own = {number for what, number in found.order[first:] if what == "begin"}
                late |= {number for what, number in found.order[first:] if what == "wait"} & begun
                begun |= own
    assert len(late) == sum((step - lag) % PERIOD == 0 for step in range(lag + 1, STEPS + 1))
    return found.order, late


def time_of(
    program: Program,
    late: set[int],
    *,
    wire: Callable[[bool], float],
    waits: Callable[[bool], bool],
    apart: bool = False,
    seed: int = 1,
) -> float:
    """Return the time after which the last replica is done, in medians of a step's passes.

    Args:
        program: What each replica does.
        late: Exchanges that are waited for in a later step.
        wire: Function that draws the time of an exchange once all have begun it and the one before it is over, by
            whether it is late.
        waits: Function that tells whether anybody waits for an exchange.
        apart: Whether late ones have a group and a wire of their own.
        seed: Seed of the times of passes.
    """
    draw, clocks, free, done = random.Random(seed), [0.0] * REPLICAS, [0.0, 0.0], {}
    for what, number in program:
        is_late = number in late
        if what == "work":
            clocks = [clock + draw.lognormvariate(0.0, 0.5) for clock in clocks]
        elif what == "begin":
            lane = int(is_late and apart)
            free[lane] = done[number] = max(*clocks, free[lane]) + wire(is_late)
        elif waits(is_late):
            clocks = [max(clock, done[number]) for clock in clocks]
    return max(clocks)


def saved(program: Program, late: set[int], *, wire: Callable[[], Callable[[bool], float]], apart: bool) -> float:
    """Return the share of the time that is saved if nobody ever waits for late exchanges."""
    usual = time_of(program, late, wire=wire(), waits=lambda _: True, apart=apart)
    return 1 - time_of(program, late, wire=wire(), waits=lambda is_late: not is_late, apart=apart) / usual


@pytest.mark.parametrize("lag", [1, PERIOD - 1])
@pytest.mark.parametrize("zero", [0, 1])
def test_who_waits_at_a_late_sum_waits_for_its_wire_alone(zero: int, lag: int):
    program, late = program_of(zero, lag)

    def heavy() -> Callable[[bool], float]:
        draw = random.Random(2)
        return lambda _: 0.02 * draw.paretovariate(1.1)

    # In one group exchanges are over in the order in which they began: those of the next step come behind.
    assert saved(program, late, wire=heavy, apart=False) == 0
    # In a group of its own, with a wire that is faster than the passes of the lag.
    assert saved(program, late, wire=lambda: lambda is_late: 0.5 if is_late else 0.02, apart=True) == 0
    # A wire that is slower costs time, which a longer lag saves as well.
    slow = saved(program, late, wire=lambda: lambda is_late: 3.0 if is_late else 0.02, apart=True)
    assert slow > 0.05 if lag == 1 else slow == 0, slow
    # Replicas that shared nothing but these sums would wait for each other here.
    usual, alone = (
        time_of(program, late, wire=lambda _: 0.0, waits=lambda is_late, counts=counts: is_late and counts)
        for counts in (True, False)
    )
    assert usual > 1.05 * alone or lag > 1
