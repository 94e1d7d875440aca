"""Train one recipe with every update rule for its matrices, each over the same learning rates, at equal tokens.

Prints the held-out loss at the end as Markdown and plots the best run of each rule. Runs that are complete are not
repeated: the run folders under `--out` are the record.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from rows import show

DIVERGED = 6
"""Exit code."""

RULES = {
    "adamw": (),
    "muon": ("optim.muon.adjust_lr_fn=match_rms_adamw",),
    "m3": (),
    "delta_momentum": ("optim.delta_momentum.beta2=0.95",),
    "deep_momentum": ("optim.deep_momentum.update_rms=0.2",),
    # The recipe's patterns without initial states of memories, which are no layers.
    "dgd": ('optim.groups.matrices.match=["*_proj.weight", "*.gate.weight", "*.up.weight", "*.down.weight"]',),
}
"""Settings with which a rule's updates are about as long as AdamW's, so that one grid of learning rates fits all. DGD's
have the length of the gradient, and its rate decides of the decay too: it has none that would do so."""


def main() -> None:
    """Train what is missing, then show and plot all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="for all runs")
    parser.add_argument("--recipe", default="demo_m3", help="its group `matrices` gets the rule")
    parser.add_argument("--rules", type=lambda text: text.split(","), default=list(RULES))
    parser.add_argument("--lrs", type=lambda text: text.split(","), default=["1e-3", "3e-3", "1e-2"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run folders")
    parser.add_argument("--plot", type=Path, help="image to write")
    arguments = parser.parse_args()
    trials = list(product(arguments.rules, arguments.lrs))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        curves = dict(zip(trials, pool.map(lambda trial: train(*trial, arguments), trials), strict=True))
    best = {rule: min(curves[rule, lr][-1][1] for lr in arguments.lrs) for rule in arguments.rules}
    losses = [
        {"rule": rule} | {lr: curves[rule, lr][-1][1] for lr in arguments.lrs} | {"best": best[rule]}
        for rule in arguments.rules
    ]
    show(losses, {"rule": ""} | dict.fromkeys([*arguments.lrs, "best"], ".3f"))
    if arguments.plot:
        plot(curves, arguments.plot)


def train(rule: str, lr: str, arguments: argparse.Namespace) -> list[tuple[int, float]]:
    """Run one trial, unless it is complete; return tokens and held-out loss of every validation.

    A run that diverges ends with an infinite loss.
    """
    run_dir = arguments.out / f"{rule}-{lr}"
    settings = [f"optim.groups.matrices.rule={rule}", *RULES[rule], f"optim.lr={lr}", *arguments.settings]
    command = [sys.executable, "-m", "hopescale", "train", arguments.recipe, *settings, "--run-dir", str(run_dir)]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode not in (0, DIVERGED):
        sys.exit(f"{' '.join(command)}\n{done.stderr or done.stdout}")
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    curve = [
        (record["tokens_seen"], math.inf if value is None else value)
        for record in records
        for name, value in record.items()
        if name.startswith("val/") and name.endswith("/loss")
    ]
    return [*curve, (records[-1]["tokens_seen"], math.inf)] if done.returncode else curve


def plot(curves: dict[tuple[str, str], list[tuple[int, float]]], path: Path) -> None:
    """Draw the best run of each rule."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for rule in dict.fromkeys(rule for rule, _ in curves):
        _, lr = min((curve[-1][1], lr) for (name, lr), curve in curves.items() if name == rule)
        tokens, losses = zip(*(point for point in curves[rule, lr] if math.isfinite(point[1])), strict=True)
        axes.plot([count / 1000 for count in tokens], losses, marker="o", markersize=3, label=f"{rule}, lr {lr}")
    axes.set(xlabel="thousand tokens", ylabel="held-out loss (nats)", title="Best learning rate of each rule")
    figure.legend(loc="outside right center")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
