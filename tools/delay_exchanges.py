"""How much longer a step takes if every exchange between ranks takes longer by some milliseconds.

    torchrun --nproc-per-node 2 tools/delay_exchanges.py --out delayed debug parallel.zero=1

trains a recipe on the CPU, and delays the exchanges of every second eight steps: in the same process and minutes, so
that a busy machine disturbs both alike. Exchanges of a group go one after the other; one that was begun in the
background is over when its time has passed, whether somebody waits for it or not. Prints the median step of both.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import torch.distributed as dist

from hopescale.cli.app import main
from hopescale.engine import Engine
from hopescale.optim import OuterOptimizer

EXCHANGES = ("all_reduce", "broadcast", "reduce_scatter_tensor", "all_gather_into_tensor", "all_to_all_single")
BLOCK = 8


class Delay:
    """Delays exchanges while it is on.

    Args:
        seconds: Time of an exchange beside its own.
    """

    def __init__(self, seconds: float):
        self.seconds, self.is_on = seconds, False
        self.count: Counter[str] = Counter()
        self._free: dict[str, float] = {}

    def install(self) -> None:
        """Take the place of torch's functions."""
        for name in EXCHANGES:
            setattr(dist, name, self._delayed(name, getattr(dist, name)))

    def _delayed(self, name: str, original: Any) -> Any:
        def exchange(*tensors: Any, group: Any = None, async_op: bool = False, **options: Any) -> Any:
            group = group or dist.group.WORLD
            if not self.is_on or group.size() == 1:
                return original(*tensors, group=group, async_op=async_op, **options)
            self.count[name] += 1
            begin = max(time.perf_counter(), self._free.get(group.group_name, 0.0))
            end = self._free[group.group_name] = begin + self.seconds
            work = _Late(original(*tensors, group=group, async_op=True, **options), end)
            return work if async_op else work.wait()

        return exchange


class _Late:
    def __init__(self, work: dist.Work, end: float):
        self._work, self._end = work, end

    def wait(self) -> None:
        self._work.wait()
        time.sleep(max(0.0, self._end - time.perf_counter()))


def run() -> None:
    """Train, and print what was measured on the first rank."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--milliseconds", type=float, default=5.0, help="time that an exchange takes longer")
    parser.add_argument("--in-turn", action="store_true", help="let no exchange run beside a pass, to compare")
    parser.add_argument("--steps", type=int, default=64, help="steps, of which half are delayed")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run, which must not hold one")
    parser.add_argument("recipe", help="name or path of a recipe")
    parser.add_argument("overrides", nargs="*", help="settings, as of hopescale train")
    options = parser.parse_args()
    if options.steps < 2 * BLOCK:
        parser.error(f"--steps is {options.steps}, but blocks of {BLOCK} steps are compared: name {2 * BLOCK} or more")
    delay, begins, gradients = Delay(options.milliseconds / 1000), [], Engine.gradients

    def timed(engine: Engine, step: int, *arguments: Any, **how: Any) -> Any:
        delay.is_on = (step - 1) // BLOCK % 2 == 1
        begins.append(time.perf_counter())
        return gradients(engine, step, *arguments, **how)

    delay.install()
    if options.in_turn:
        OuterOptimizer.expect = OuterOptimizer.defer = lambda *_: None
    Engine.gradients = timed
    never = ("train.validation.every=null", "checkpoint.every=null", "train.replica_check_every=null")
    quiet = (f"train.steps={options.steps}", f"log.every={options.steps}", "log.trackers=[]", "train.device=cpu")
    place = ("--run-dir", str(options.out), "--resume", "never")
    try:
        main(["train", options.recipe, *place, *never, *quiet, *options.overrides])
    except SystemExit as end:
        if end.code:
            raise
    took: dict[bool, list[float]] = {False: [], True: []}
    for number, (begin, end) in enumerate(zip(begins, begins[1:], strict=False)):
        if number % BLOCK:  # what a block hands on to the next is not counted
            took[number // BLOCK % 2 == 1].append(end - begin)
    if os.environ.get("RANK", "0") != "0":
        return
    without, late = (1000 * median(took[is_late]) for is_late in (False, True))
    exchanges = sum(delay.count.values()) / (len(begins) / 2)
    sys.stdout.write(
        f"a step takes {without:.0f} ms, and {late:.0f} with {options.milliseconds:g} ms more for each of "
        f"{exchanges:.1f} exchanges: {late / without:.3f} times as long\n"
    )


if __name__ == "__main__":
    run()
