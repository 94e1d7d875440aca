"""Train a small Hope at several widths and learning rates, with and without `model.transfer`, and plot the losses.

Runs that are complete are not repeated: the run folders under `--out` are the record.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from itertools import product
from pathlib import Path

from hopescale.cli.app import main as hopescale

RATES = ",".join(f"{2.0**-k:g}" for k in range(9, 5, -1))
HEAD_DIM = 16
RUN = (
    "model.mixers.hope={memory: linear, chunk_size: 32}",
    "model.cms.levels.mid=null",
    "model.cms.levels.slow=null",
    "optim.groups.no_decay.lr_scale=0.25",
    "optim.groups.memories={match: ['*.mixer.banks.*'], lr_scale: 0.25}",
    "optim.schedule.warmup_steps=10",
    "train.recompute=none",
    "train.global_batch_tokens=512",
    "train.validation={every: 10000, tokens: 16Ki}",
    "checkpoint.every=null",
    "log={every: 10, trackers: []}",
)
"""What all runs have in common, on top of the recipe `debug`: a second-order chain of 24 symbols, two blocks with one
level, 512 tokens a step. At the base width memories, gates and norms learn better at a quarter of the rate."""


def main() -> None:
    """Train what is missing, write the table, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="for all runs")
    parser.add_argument("--widths", type=lambda text: [*map(int, text.split(","))], default=[64, 128, 256, 512])
    parser.add_argument("--base", type=int, default=128, help="width on which the rate is tuned")
    parser.add_argument("--lrs", type=lambda text: text.split(","), default=RATES.split(","))
    parser.add_argument("--rules", type=lambda text: text.split(","), default=["none", "transfer"])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run folders")
    parser.add_argument("--finished", action="store_true", help="train nothing; show the trials that are complete")
    parser.add_argument("--table", type=Path, default=Path("docs/width_transfer.csv"))
    parser.add_argument("--plot", type=Path, default=Path("docs/images/width_transfer.png"))
    arguments = parser.parse_args()
    trials = sorted(product(arguments.rules, arguments.widths, arguments.lrs), key=lambda trial: trial[1])
    found = {trial: finished(*trial, arguments) if arguments.finished else train(*trial, arguments) for trial in trials}
    losses = {trial: loss for trial, loss in found.items() if loss is not None}
    with arguments.table.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["rule", "width", "lr", "loss"])
        table.writerows([*trial, f"{loss:.4f}"] for trial, loss in sorted(losses.items()))
    plot(losses, arguments)


def folder_of(rule: str, width: int, lr: str, arguments: argparse.Namespace) -> Path:
    """Return the run folder of a trial; at the base width both rules are one run."""
    return arguments.out / f"{'none' if width == arguments.base else rule}-{width}-{lr}"


def train(rule: str, width: int, lr: str, arguments: argparse.Namespace) -> float:
    """Run one trial, unless it is complete; return the held-out loss at its end, infinite if it diverged."""
    transfers = rule == "transfer" and width != arguments.base
    settings = [
        *RUN,
        f"model.d_model={width}",
        f"model.num_heads={width // HEAD_DIM}",
        f"model.cms.levels.fast.d_ff={width}",
        f"train.steps={arguments.steps}",
        f"optim.lr={lr}",
        *([f"model.transfer={{base_width: {arguments.base}}}"] if transfers else []),
        *arguments.settings,
    ]
    try:
        hopescale(["train", "debug", *settings, "--run-dir", str(folder_of(rule, width, lr, arguments))])
    except SystemExit as ended:
        if ended.code == 6:
            return math.inf
        if ended.code:
            raise
    return finished(rule, width, lr, arguments)


def finished(rule: str, width: int, lr: str, arguments: argparse.Namespace) -> float | None:
    """Return the held-out loss at the end of a trial, None if it has not ended."""
    metrics = folder_of(rule, width, lr, arguments) / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    return next(
        (r["val/markov/loss"] for r in records if r["step"] == arguments.steps and "val/markov/loss" in r), None
    )


def plot(losses: dict[tuple[str, int, str], float], arguments: argparse.Namespace) -> None:
    """Draw loss over learning rate, a line for each width, a panel for each rule; stars mark the best rates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {"none": "model.transfer: null", "transfer": f"model.transfer.base_width: {arguments.base}"}
    figure, panels = plt.subplots(1, len(arguments.rules), figsize=(10, 4.4), sharey=True, layout="constrained")
    for axes, rule in zip(panels, arguments.rules, strict=True):
        for color, width in enumerate(arguments.widths):
            curve = [(float(lr), losses[rule, width, lr]) for lr in arguments.lrs if (rule, width, lr) in losses]
            if not curve:
                continue
            shades = plt.get_cmap("viridis")(color / len(arguments.widths))
            axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, color=shades, label=f"width {width}")
            axes.plot(*min(curve, key=lambda point: point[1]), marker="*", markersize=14, color=shades)
        axes.set(title=titles[rule], xlabel="learning rate (optim.lr)", xscale="log")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    found = sorted(loss for loss in losses.values() if math.isfinite(loss))
    panels[0].set(ylabel="held-out loss (nats per token)", ylim=(found[0] - 0.1, found[0] + 1.5))
    panels[-1].legend()
    figure.savefig(arguments.plot, dpi=110)


if __name__ == "__main__":
    main()
