"""Train one recipe with levels that take turns, come late or are rounded on the wire, over seeds, at equal tokens.

Prints the held-out loss at the end of every run, and as Markdown the mean of each way and its mean difference from
levels as they are. All runs are on this process, which rounds sums as a replica does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from rows import show

from hopescale.config.check import require_valid
from hopescale.config.layout import make_layout
from hopescale.config.load import load_recipe
from hopescale.observe.metrics import read_metrics
from hopescale.parallel.mesh import Mesh
from hopescale.train.request import RunRequest
from hopescale.train.stop import StopRequest
from hopescale.train.worker import train_on

WAYS = {
    "as it is": "{}",
    "rolling": "{rolling: true}",
    "lag 1": "{lag: 1}",
    "longest lag": "{lag: LONGEST}",
    "wire bf16": "{wire: bf16}",
    "wire int8": "{wire: int8}",
    "wire int4": "{wire: int4}",
}
"""Settings of every level with a period above 1; `LONGEST` is its period less 1."""


def main() -> None:
    """Train all, seed by seed, and show what each way costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="for all runs")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--ways", type=lambda text: text.split(","), default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run folders, which must be new")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    mesh, losses = Mesh.alone(), {way: [] for way in arguments.ways}
    for seed in range(1, arguments.seeds + 1):
        for way in arguments.ways:
            losses[way].append(train(way, seed, mesh, arguments))
            sys.stdout.write(f"seed {seed}, {way}: {losses[way][-1]:.4f}\n")
            sys.stdout.flush()
    base = losses[arguments.ways[0]]
    table = [
        {
            "levels": way,
            "loss": statistics.mean(found),
            "difference": statistics.mean(a - b for a, b in zip(found, base, strict=True)),
            **{f"seed {seed}": loss for seed, loss in enumerate(found, start=1)},
        }
        for way, found in losses.items()
    ]
    show(
        table, {"levels": "", "loss": ".4f", "difference": "+.4f"} | {f"seed {i + 1}": ".4f" for i in range(len(base))}
    )


def train(way: str, seed: int, mesh: Mesh, arguments: argparse.Namespace) -> float:
    """Train one run; return its last held-out loss."""
    settings = [*arguments.settings, f"train.seed={seed}"]
    for name, level in load_recipe(arguments.recipe, settings).config.model.cms.levels.items():
        if level.update_every_steps > 1:
            chosen = WAYS[way].replace("LONGEST", str(level.update_every_steps - 1))
            settings.append(f"model.cms.levels.{name}={chosen}")
    loaded = require_valid(load_recipe(arguments.recipe, settings))
    folder = arguments.out / f"{way.replace(' ', '_')}-{seed}"
    request = RunRequest(loaded, make_layout(loaded.config, 1), folder, settings)
    train_on(mesh, torch.device("cpu"), request, StopRequest(), lambda line: None)
    values = [
        value
        for record in read_metrics(folder / "metrics.jsonl")
        for name, value in record.items()
        if name.startswith("val/") and name.endswith("/loss")
    ]
    return values[-1]


if __name__ == "__main__":
    main()
