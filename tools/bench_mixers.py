"""Compare mixers with the Transformer block of the same width: tokens/s and extra peak memory, forward and backward.

docs/performance.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import torch
from measure import costs, fresh_process
from rows import Row, add, show
from stacks import BASELINE, Shape, add_shape, configure, shape_of, systems

from hopescale.common.errors import ConfigError
from hopescale.config.model_shape import mixer_of_block
from hopescale.cost.flops import block_flops
from hopescale.cost.hardware import peak_bf16_flops
from hopescale.parallel.device import choose_device


def main() -> None:
    """Measure, print the table as Markdown, write JSON lines and a plot if asked."""
    arguments = parse()
    shape = shape_of(arguments)
    try:
        device = choose_device(arguments.device, "--device")
        mixers = list(dict.fromkeys([BASELINE, *(arguments.mixers or systems(shape.size))]))
        for mixer in mixers:
            configure(mixer, shape)
    except ConfigError as error:
        sys.exit(str(error))
    rows = []
    for row in measure(mixers, shape, device, arguments):
        rows.append(row)
        add(row, arguments.out)
    ratios = {"tps": ",.0f", "tps_ratio": ".2f", "extra_mib": ",.0f", "memory_ratio": ".2f", "mfu": ".1%"}
    show(rows, {"mixer": "", "seq_len": "", "threads": ""} | ratios)
    if arguments.plot:
        plot(rows, arguments.plot)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = "of the recipes; NAME:KEY=VALUE changes a setting of the mixer; default: all"
    parser.add_argument("--mixers", type=words, metavar="NAME,...", help=names)
    parser.add_argument("--seq-lens", type=partial(words, kind=int), default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--threads", type=partial(words, kind=int), default=[1, 2], help="of the CPU")
    parser.add_argument("--device", default="auto")
    add_shape(parser)
    parser.add_argument("--rounds", type=int, default=5, help="passes of each mixer, in turn; the fastest counts")
    parser.add_argument("--out", type=Path, help="file to which a JSON object per row is added")
    parser.add_argument("--plot", type=Path, help="image to write")
    return parser.parse_args()


def words(text: str, kind: type = str) -> list:
    """Split at commas."""
    return [kind(word) for word in text.split(",")]


def measure(mixers: list[str], shape: Shape, device: torch.device, arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield a row per length, number of threads and mixer; those that memory does not allow are left out."""
    peak = peak_bf16_flops(torch.cuda.get_device_name()) if device.type == "cuda" else None
    needs: dict[str, float] = {}
    for seq_len in sorted(arguments.seq_lens):
        fitting = [mixer for mixer in mixers if fits(needs.get(mixer, 0) * seq_len, device)]
        if left_out := [mixer for mixer in mixers if mixer not in fitting]:
            print(f"{seq_len} tokens take more memory than is free: {', '.join(left_out)}", file=sys.stderr)
        if BASELINE in left_out:
            return
        for threads in arguments.threads:
            with fresh_process(threads) as process:
                found = process.submit(costs, fitting, shape, seq_len, device, arguments.rounds).result()
            for mixer, cost in found.items():
                needs[mixer] = cost.extra_mib / seq_len
                row = {"mixer": mixer, "seq_len": seq_len, "threads": threads, "tps": shape.batch * seq_len / cost.best}
                row |= {"tps_ratio": found[BASELINE].best / cost.best, "extra_mib": cost.extra_mib}
                row |= {"memory_ratio": cost.extra_mib / found[BASELINE].extra_mib, "spread": cost.median / cost.best}
                if peak is not None:
                    row["mfu"] = row["tps"] * flops_per_token(mixer, shape, seq_len) / peak
                yield row | {"device": device.type} | vars(shape)


def fits(mib: float, device: torch.device) -> bool:
    """Say whether so much memory is free."""
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
    return mib * 2**20 < 0.8 * free


def flops_per_token(mixer: str, shape: Shape, seq_len: int) -> float:
    """Count forward and backward of a stack of blocks, without embedding and head."""
    model = configure(mixer, shape)
    mixers = [mixer_of_block(model, block) for block in range(1, shape.layers + 1)]
    return sum(part.total for mixer in mixers for part in block_flops(model, mixer, seq_len).values())


def plot(rows: list[Row], path: Path) -> None:
    """Draw tokens/s and memory over length, dashed for more than one thread."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5))
    mixers, threads = (list(dict.fromkeys(row[key] for row in rows)) for key in ("mixer", "threads"))
    for axis, key, label in zip(axes, ("tps", "extra_mib"), ("tokens/s", "extra peak memory, MiB"), strict=True):
        for color, mixer in enumerate(mixers):
            for count in threads if key == "tps" else threads[:1]:
                points = [(r["seq_len"], r[key]) for r in rows if (r["mixer"], r["threads"]) == (mixer, count)]
                style = {"color": f"C{color}", "linestyle": "-" if count == threads[0] else "--", "marker": "."}
                axis.loglog(*zip(*points, strict=True), **style, label=mixer if count == threads[0] else None)
        axis.set(xlabel="tokens of a sequence", ylabel=label)
        lengths = sorted({row["seq_len"] for row in rows})
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes[1].legend()
    figure.savefig(path, bbox_inches="tight")


if __name__ == "__main__":
    main()
