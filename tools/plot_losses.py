"""Draw the losses of finished runs over the tokens they read.

The figure of the README is that of the demo's recipes with `train.validation.every=20 log.every=20`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hopescale.observe.metrics import read_metrics


def main() -> None:
    """Read the runs named on the command line and write one figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; the folder's name is the label")
    parser.add_argument("--out", type=Path, default=Path("docs/images/demo.svg"))
    arguments = parser.parse_args()
    plot({run.name: losses(run) for run in arguments.runs}, arguments.out)


def losses(run: Path) -> list[tuple[str, float, float]]:
    """Return the name, thousands of tokens and value of every loss in a run's metrics."""
    return [
        (name, record["tokens_seen"] / 1000, value)
        for record in read_metrics(run / "metrics.jsonl")
        for name, value in record.items()
        if name == "loss" or (name.startswith("val/") and name.endswith("/loss"))
    ]


def plot(curves: dict[str, list[tuple[str, float, float]]], path: Path) -> None:
    """Draw training losses as thin lines, held-out losses as dots of the same colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "hopescale"  # the same figure is the same file
    figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    for index, (run, points) in enumerate(curves.items()):
        training = [(tokens, loss) for name, tokens, loss in points if name == "loss"]
        held_out = [(tokens, loss) for name, tokens, loss in points if name != "loss"]
        axes.plot(*zip(*training, strict=True), color=f"C{index}", alpha=0.4, linewidth=1)
        label = f"{run}, held out: {held_out[-1][1]:.3f} at the end"
        axes.plot(*zip(*held_out, strict=True), "o-", color=f"C{index}", markersize=4, label=label)
    axes.set(xlabel="thousand tokens", ylabel="loss (nats per token)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


if __name__ == "__main__":
    main()
