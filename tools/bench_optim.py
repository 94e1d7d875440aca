"""Time the optimizer step of a model's matrices: one at a time, stacked in each step, and kept as stacks."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch import nn

from hopescale.config.groups import assign_groups
from hopescale.config.load import load_recipe
from hopescale.config.schema import OptimConfig
from hopescale.models import Model
from hopescale.optim import Cadence
from hopescale.optim.layerwise import LayerwiseOptimizer
from hopescale.optim.rules import RULES, make_rule
from hopescale.optim.stacked import STACK_ELEMENTS
from hopescale.optim.updater import RuleGroup
from hopescale.parallel.layers import ParameterSpec, attach
from hopescale.parallel.mesh import Mesh

LAYERS = ("*_proj.weight", "*.gate.weight", "*.up.weight", "*.down.weight")
BANKS = ("*.mixer.banks.*",)
"""Initial states of memories: matrices without inputs, which DGD cannot update."""


def main() -> None:
    """Print a line per rule, and write it as JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", nargs="?", default="debug", help="whose matrices")
    parser.add_argument("overrides", nargs="*", help="changes to the recipe, such as optim.muon.ns_dtype=bf16")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--shape", help="instead of a recipe's: MATRICESxROWSxCOLUMNS")
    parser.add_argument("--rounds", type=int, default=12, help="of four steps of each kind, in turn; the median counts")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rules", nargs="+", default=["muon", "m3"], choices=list(RULES))
    parser.add_argument("--out", type=Path, help="file to which a JSON object per rule is added")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{'rule':<16}{'matrices':>9}{'looped':>9}{'stacked':>9}{'ratio':>7}{'kept':>9}{'ratio':>7}   ms per step")
    for rule in arguments.rules:
        config, shapes = problem(rule, arguments)
        matrices = sum(shape[:-2].numel() for shape in shapes)
        looped, stacked, kept = measure(rule, config, shapes, arguments)
        ratios = looped / stacked, looped / kept
        times = f"{1e3 * looped:>9.2f}{1e3 * stacked:>9.2f}{ratios[0]:>7.2f}{1e3 * kept:>9.2f}{ratios[1]:>7.2f}"
        print(f"{rule:<16}{matrices:>9}{times}", flush=True)
        if arguments.out:
            record = {"rule": rule, "problem": arguments.shape or [arguments.recipe, *arguments.overrides]}
            record |= {"matrices": matrices, "device": arguments.device, "threads": arguments.threads}
            record |= {"looped_s": looped, "stacked_s": stacked, "kept_s": kept, "ratio": ratios[1]}
            with arguments.out.open("a") as file:
                file.write(json.dumps(record) + "\n")


def problem(rule: str, arguments: argparse.Namespace) -> tuple[OptimConfig, list[torch.Size]]:
    """Return the settings and the shapes of what is updated."""
    match = [*LAYERS, *(BANKS if rule != "dgd" else ())]
    group = f"optim.groups.matrices={{rule: {rule}, match: {match}}}"
    settings = [f"model.num_layers={arguments.layers}", group, *arguments.overrides]
    config = load_recipe(arguments.recipe, settings).config
    if arguments.shape:
        count, *shape = map(int, arguments.shape.split("x"))
        return config.optim, [torch.Size(shape)] * count
    shapes = {name: parameter.shape for name, parameter in Model(config.model).named_parameters()}
    chosen = assign_groups(shapes, config.optim.groups)
    return config.optim, [shape for name, shape in shapes.items() if chosen[name] == "matrices"]


def measure(
    rule: str, config: OptimConfig, shapes: list[torch.Size], arguments: argparse.Namespace
) -> tuple[float, float, float]:
    """Return the seconds of a step with one matrix at a time, with stacks made in the step, and with stacks kept."""
    device = arguments.device
    weights = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    gradients = [torch.randn_like(weight) for weight in weights]
    separate = make_rule(rule, [{"params": weights, "weight_decay": 0.1, "lr": 1e-3}], config)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
        if rule == "dgd":
            weight.gram = torch.eye(weight.shape[-1], device=device)
    kept = make_updater(rule, config, weights)
    names, rates = list(kept.parameters), {"matrices": 1e-3}

    def gather() -> None:
        for name, gradient in zip(names, gradients, strict=True):
            kept.accumulated_grad(name).copy_(gradient)

    alone = patch.dict(STACK_ELEMENTS, dict.fromkeys(STACK_ELEMENTS, 1))
    times: list[list[float]] = [[], [], []]
    for _ in range(1 + arguments.rounds):
        # Four steps are a period of M3's slow momentum.
        with alone:
            times[0].append(sum(seconds(separate.step, device) for _ in range(4)) / 4)
        times[1].append(sum(seconds(separate.step, device) for _ in range(4)) / 4)
        spent = 0.0
        for _ in range(4):
            gather()
            spent += seconds(lambda: kept.update(names, dict.fromkeys(names, 1.0), rates), device)
        times[2].append(spent / 4)
    looped, stacked, whole = (median(each[1:]) for each in times)
    return looped, stacked, whole


def make_updater(rule: str, config: OptimConfig, weights: list[nn.Parameter]) -> LayerwiseOptimizer:
    """Return the trainer's keeper of masters and state over copies of weights."""
    copies = (nn.Parameter(weight.detach().clone()) for weight in weights)
    parameters = {str(index): attach(copy, ParameterSpec()) for index, copy in enumerate(copies)}
    groups = [RuleGroup("matrices", tuple(parameters), 0.1, None, rule)]
    cadences = dict.fromkeys(parameters, Cadence())
    return LayerwiseOptimizer(parameters, groups, config=config, cadences=cadences, mesh=Mesh.alone())


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
