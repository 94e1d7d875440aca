"""Time an optimizer step over many matrices of one shape: one at a time, stacked in each step, and kept as a stack."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch import nn

from hopescale.optim.deep_momentum import DeepMomentum
from hopescale.optim.delta_momentum import DeltaMomentum
from hopescale.optim.dgd import DGD, InputGram
from hopescale.optim.m3 import M3
from hopescale.optim.muon import Muon
from hopescale.optim.stacked import STACK_ELEMENTS

RULES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "muon": Muon,
    "muon-bf16": partial(Muon, ns_dtype=torch.bfloat16),
    "m3": M3,
    "delta_momentum": DeltaMomentum,
    "deep_momentum": DeepMomentum,
    "dgd": lambda weights: DGD(weights, grams={weight: gram_of(weight) for weight in weights}),
}


def gram_of(weight: torch.Tensor) -> InputGram:
    """Return a Gram matrix that has seen no input."""
    return InputGram(nn.Linear(weight.shape[-1], weight.shape[-2], device=weight.device))


def main() -> None:
    """Print a line per rule, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--matrices", type=int, default=8, help="of a layer")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--columns", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15, help="steps of each kind, in turn; the median counts")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=RULES)
    parser.add_argument("--out", type=Path, help="file to which a JSON object per rule is added")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"{arguments.layers * arguments.matrices} matrices of {arguments.rows} x {arguments.columns} "
        f"on {arguments.device}, {arguments.threads} threads; ms per step"
    )
    print(f"{'rule':<16}{'looped':>10}{'batched':>10}{'ratio':>8}{'kept':>10}{'ratio':>8}")
    for rule in arguments.rules:
        looped, batched, kept = measure(rule, arguments)
        columns = f"{1e3 * looped:>10.2f}{1e3 * batched:>10.2f}{looped / batched:>8.2f}"
        print(f"{rule:<16}{columns}{1e3 * kept:>10.2f}{looped / kept:>8.2f}", flush=True)
        if arguments.out:
            shape = [arguments.layers * arguments.matrices, arguments.rows, arguments.columns]
            record = {"rule": rule, "shape": shape, "device": arguments.device, "threads": arguments.threads}
            record |= {"looped_s": looped, "batched_s": batched, "ratio": looped / batched}
            record |= {"kept_s": kept, "kept_ratio": looped / kept}
            with arguments.out.open("a") as file:
                file.write(json.dumps(record) + "\n")


def measure(rule: str, arguments: argparse.Namespace) -> tuple[float, float, float]:
    """Return the seconds of a step with one matrix at a time, with stacks made in the step, and with one parameter."""
    count = arguments.layers * arguments.matrices
    many = build(rule, [(arguments.rows, arguments.columns)] * count, arguments.device)
    one = build(rule, [(count, arguments.rows, arguments.columns)], arguments.device)
    alone = dict.fromkeys(STACK_ELEMENTS, 1)
    looped, batched, kept = [], [], []
    for _ in range(1 + arguments.repeats):
        with patch.dict(STACK_ELEMENTS, alone):
            looped.append(seconds(many.step, arguments.device))
        batched.append(seconds(many.step, arguments.device))
        kept.append(seconds(one.step, arguments.device))
    return median(looped[1:]), median(batched[1:]), median(kept[1:])


def build(rule: str, shapes: list[tuple[int, ...]], device: str) -> torch.optim.Optimizer:
    """Make an optimizer whose parameters have gradients."""
    weights = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    return RULES[rule](weights)


def seconds(call: Callable[[], object], device: str) -> float:
    """Return how long a call and the work it starts on the device take."""
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
