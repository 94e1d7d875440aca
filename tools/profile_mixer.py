"""Show where the time of a mixer's forward and backward goes, by operation."""

from __future__ import annotations

import argparse
import sys

import torch
from measure import choose_clock
from rows import show
from stacks import add_shape, make_pass, shape_of
from torch.profiler import ProfilerActivity, profile

from hopescale.common.errors import ConfigError
from hopescale.parallel.device import choose_device


def main() -> None:
    """Profile one pass after a first one, and print the operations that took the most time of their own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mixer", help="a name and settings as bench_mixers.py takes them")
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--top", type=int, default=20, help="operations to show")
    add_shape(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        device = choose_device(arguments.device, "--device")
        run = make_pass(arguments.mixer, shape_of(arguments), arguments.seq_len, device)
    except ConfigError as error:
        sys.exit(str(error))
    clock = choose_clock(device)
    run()
    begin = clock()
    run()
    plain = clock() - begin
    with profile(activities={ProfilerActivity.CPU, getattr(ProfilerActivity, device.type.upper())}) as profiled:
        run()
        clock()
    own = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    ops = sorted(profiled.key_averages(), key=lambda op: getattr(op, own), reverse=True)
    total = sum(getattr(op, own) for op in ops)
    rows = [
        {"operation": op.key, "calls": op.count, "ms": getattr(op, own) / 1e3, "share": getattr(op, own) / total}
        for op in ops[: arguments.top]
    ]
    show(rows, {"operation": "", "calls": ",", "ms": ",.1f", "share": ".1%"})
    calls = sum(op.count for op in ops)
    print(f"{calls:,} calls, {total / 1e3:,.0f} ms under the profiler; {1e3 * plain:,.0f} ms without it")


if __name__ == "__main__":
    main()
