"""Draw update rules on the toy function of Nested Learning, Eq. 53 (Figure 4): their ways over it, and the loss."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hopescale.optim.adamw import AdamW
from hopescale.optim.delta_momentum import DeltaMomentum
from hopescale.optim.m3 import M3
from hopescale.optim.muon import Muon

START = (-3.5, 2.0)
MOMENTUM = {"lr": (5e-3, 1e-2, 1.5e-2), "momentum": (0.9, 0.95)}
RULES: dict[str, tuple[Callable, dict[str, Any], dict[str, tuple]]] = {
    "Momentum": (DeltaMomentum, {"delta": 0.0}, MOMENTUM),
    "Delta Momentum": (DeltaMomentum, {}, MOMENTUM | {"delta": (0.05, 0.1, 0.2)}),
    "AdamW": (AdamW, {"weight_decay": 0.0}, {"lr": (0.05, 0.1, 0.2, 0.4), "betas": ((0.9, 0.95), (0.9, 0.999))}),
    "Muon": (Muon, {"weight_decay": 0.0}, {"lr": (0.03, 0.05, 0.1, 0.2), "momentum": (0.9, 0.95)}),
    "M3": (M3, {"weight_decay": 0.0}, {"lr": (0.1, 0.2, 0.3, 0.5, 1.0), "beta1": (0.9, 0.95)}),
}
"""Rule, what is fixed, and the settings of which the best is drawn."""


def main() -> None:
    """Choose settings for each rule, print what was chosen, and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--last-rate", type=float, default=1.0, help="fraction that learning rates fall to, linearly")
    parser.add_argument("--out", type=Path, default=Path("docs/images/eq53.png"))
    arguments = parser.parse_args()
    ways = {}
    for name, (rule, fixed, grid) in RULES.items():
        settings, way = best(partial(rule, **fixed), grid, arguments.steps, arguments.last_rate)
        said = ", ".join(f"{key} {value}" for key, value in settings.items())
        print(f"{name:<16}{said:<40}median of the last loss {way[-1, :, 2].median():.1e}")
        ways[f"{name}\n{said}"] = way
    draw(ways, arguments.out)


def toy(r: Tensor, theta: Tensor) -> Tensor:
    """Return the loss of Eq. 53 at points, 0 at its optimum (0, 0).

    The paper gives no constants: k = 10, alpha = 1, omega = 2 make a valley whose curvature changes as it is followed.
    """
    return r**2 + 10 * (r - theta + torch.sin(2 * r)) ** 2


def follow(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int, last_rate: float = 1.0) -> Tensor:
    """Follow a rule from 64 starts: that of the paper, then others less than 0.1 away on either axis.

    Momentum thrown over the valley lands elsewhere after the least change of start or rounding: one way says little.

    Args:
        make: Returns the rule for points `[64, 1, 2]`, each a matrix.
        steps: Number of steps.
        last_rate: Fraction that the learning rate falls to over them, linearly.

    Returns:
        r, theta and loss before each step and after the last, float64 `[steps + 1, 64, 3]`.
    """
    offsets = 0.2 * torch.rand(64, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.1
    offsets[0] = 0.0
    points = nn.Parameter(torch.tensor(START) + offsets)
    rule, ways = make([points]), []
    schedule = torch.optim.lr_scheduler.LinearLR(rule, 1.0, last_rate, steps)
    for _ in range(steps + 1):
        losses = toy(points[..., 0], points[..., 1])
        ways.append(torch.cat([points.detach()[:, 0], losses.detach()], 1))
        rule.zero_grad()
        losses.sum().backward()
        rule.step()
        schedule.step()
    return torch.stack(ways)


def best(rule: Callable, grid: dict[str, tuple], steps: int, last_rate: float) -> tuple[dict[str, Any], Tensor]:
    """Return the settings whose loss has the least mean logarithm over starts and steps, and their ways."""
    choices = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    ways = [follow(partial(rule, **settings), steps, last_rate) for settings in choices]
    scores = [way[..., 2].nan_to_num(1e6).clamp(1e-12, 1e6).log().mean() for way in ways]
    return min(zip(scores, choices, ways, strict=True), key=lambda each: each[0])[1:]


def draw(ways: dict[str, Tensor], path: Path) -> None:
    """Draw the way from the paper's start on contours of the function, and losses over steps from all starts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 8), layout="constrained")
    *maps, curves = axes.flat
    theta, r = torch.meshgrid(*[torch.linspace(-4, 4, 300)] * 2, indexing="ij")
    heights = torch.log10(toy(r, theta) + 1e-2)
    for color, (axis, (title, way)) in enumerate(zip(maps, ways.items(), strict=True)):
        axis.contourf(r, theta, heights, 24, cmap="Greys", alpha=0.5)
        axis.plot(way[:, 0, 0], way[:, 0, 1], color=f"C{color}", marker=".", markersize=3, linewidth=1)
        axis.plot(0, 0, "k*", *START, "ko", markersize=9)
        axis.set(title=title, xlabel="r", ylabel="θ", xlim=(-4, 4), ylim=(-4, 4))
        if (far := way[:, 0, :2].abs().max()) > 4:
            axis.text(-3.8, -3.7, f"leaves the map, as far as {far:.1f}", backgroundcolor="w")
        low, middle, high = way[..., 2].quantile(torch.tensor([0.25, 0.5, 0.75], dtype=way.dtype), dim=1)
        curves.semilogy(middle, color=f"C{color}", label=title.partition("\n")[0])
        curves.fill_between(range(len(way)), low, high, color=f"C{color}", alpha=0.2, linewidth=0)
    curves.set(title="loss: median and middle half of 64 starts", xlabel="step", ylim=(1e-8, 1e3))
    curves.legend(loc="lower left")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
