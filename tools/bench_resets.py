"""Measure what resets gain where one sequence is all there is: the busiest of some threads, in CPU seconds.

CPU seconds do not see waits for a busy machine, which the wall clock does. docs/performance.md has figures.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from rows import show
from stacks import add_shape, make_pass, shape_of

from hopescale.common.errors import ConfigError
from hopescale.ops.self_modifying import cpp
from hopescale.parallel.device import choose_device


class Threads:
    """Runs parts of the operation in threads, and keeps the CPU seconds of all of them and of the busiest one."""

    def __init__(self, number: int):
        self.number, self.all, self.busiest = number, 0.0, 0.0

    def run(self, part: Callable[[int, int], None], heads: int) -> None:
        """Do what `parallel_for` does, and watch the time."""

        def timed(begin: int, end: int) -> float:
            start = time.thread_time()
            part(begin, end)
            return time.thread_time() - start

        count = min(self.number, heads)
        bounds = [heads * n // count for n in range(count + 1)]
        with ThreadPoolExecutor(count) as pool:
            seconds = list(pool.map(timed, bounds[:-1], bounds[1:]))
        self.all += sum(seconds)
        self.busiest += max(seconds)


def main() -> None:
    """Take passes of the mixers in turn, and print the fastest of each as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mixers", default="hope,hope:reset_every=512", help="as bench_mixers.py takes them")
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2, help="of the operation; the rest runs in one")
    parser.add_argument("--rounds", type=int, default=3)
    add_shape(parser)
    parser.set_defaults(batch=1, layers=1, backend="cpp")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        device, shape = choose_device("cpu", "--device"), shape_of(arguments)
        names = arguments.mixers.split(",")
        passes = {name: make_pass(name, shape, arguments.seq_len, device) for name in names}
    except ConfigError as error:
        sys.exit(str(error))
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in passes}
    for _ in range(arguments.rounds):
        for name, run in passes.items():
            threads = Threads(arguments.threads)
            cpp.parallel_for = threads.run
            begin = time.process_time()
            run()
            total = time.process_time() - begin
            found[name].append((threads.busiest, total - threads.all + threads.busiest, total))
    first = [min(times) for times in zip(*found[names[0]], strict=True)]
    rows = []
    for name, measured in found.items():
        busiest, path, total = (min(times) for times in zip(*measured, strict=True))
        rows.append({"mixer": name, "operation": busiest, "pass": path, "all threads": total, "gain": first[1] / path})
    show(rows, {"mixer": "", "operation": ",.3f", "pass": ",.3f", "all threads": ",.3f", "gain": ".2f"})


if __name__ == "__main__":
    main()
