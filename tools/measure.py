"""How long passes take and how much memory they need."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import accumulate
from multiprocessing import get_context
from statistics import median
from typing import NamedTuple

import torch
from stacks import Shape, make_pass
from torch.profiler import ProfilerActivity, profile


class Measured(NamedTuple):
    """Of a mixer's passes: seconds of the fastest and of the one in the middle, and extra peak memory in MiB."""

    best: float
    median: float
    extra_mib: float


def fresh_process(threads: int) -> ProcessPoolExecutor:
    """Return a process to submit work to; torch finds so many threads when it starts there."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def choose_clock(device: torch.device) -> Callable[[], float]:
    """Return a clock in seconds that waits for the device.

    One thread of a CPU is timed by what the CPU spent on it, which other processes disturb little; several threads and
    a CUDA device are timed by the wall.
    """
    if device.type == "cuda":

        def clock() -> float:
            torch.cuda.synchronize()
            return time.perf_counter()

        return clock
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def costs(mixers: list[str], shape: Shape, seq_len: int, device: torch.device, rounds: int) -> dict[str, Measured]:
    """Time passes of several mixers in turn, then measure the memory of one more of each."""
    passes = {mixer: make_pass(mixer, shape, seq_len, device) for mixer in mixers}
    clock = choose_clock(device)
    times: dict[str, list[float]] = {mixer: [] for mixer in mixers}
    for _ in range(rounds):
        for mixer, run in passes.items():
            begin = clock()
            run()
            times[mixer].append(clock() - begin)
    return {mixer: Measured(min(seen), median(seen), extra_mib(passes[mixer], device)) for mixer, seen in times.items()}


def extra_mib(run: Callable[[], None], device: torch.device) -> float:
    """Return the most memory in MiB that torch holds during a pass beyond what it held before.

    It is the sum of what torch has asked of its allocator: what that keeps, or shares with other passes, is not seen.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(size for _, size in changes)) / 2**20
