"""The memory of each stage as a picture. Needs matplotlib, of the extra `scaling`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hopescale.common.errors import ConfigError
from hopescale.cost.device_memory import KINDS


def draw_memory(report: Mapping[str, Any], path: Path) -> None:
    """Draw a bar for each stage, of what takes memory, against what the device has.

    Args:
        report: As `make_report` returns it.
        path: Image to write; its ending is its format.

    Raises:
        ConfigError: If matplotlib is missing, or cannot write such a file.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed", "pip install 'hopescale[scaling]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages, gib = report["memory"]["stages"], 2**30
    device, layout = report["device"], report["layout"]
    unit, scale = ("GiB", gib) if device["memory"] >= gib else ("MiB", 2**20)
    figure, axes = pyplot.subplots(figsize=(max(4.5, 1.8 + 0.8 * len(stages)), 5))
    numbers, bottom = range(len(stages)), [0.0] * len(stages)
    colors = pyplot.get_cmap("tab10").colors
    for kind, color in zip(KINDS, colors, strict=True):
        heights = [stage[kind] / scale for stage in stages]
        if any(heights):
            axes.bar(numbers, heights, 0.7, bottom=bottom, label=kind, color=color)
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
    most = device["memory"] / scale
    if max(bottom) > 0.2 * most:
        axes.axhline(most, color="black", linestyle="--", linewidth=1)
        axes.annotate(f"{device['name']}: {most:.1f} {unit}", (-0.4, most), va="bottom", fontsize=8)
    axes.set_xticks(numbers, [f"stage {number}" for number in numbers] if len(stages) > 1 else ["a rank"])
    axes.set_ylabel(f"device memory at its most, {unit}")
    axes.set_title(
        f"{report['name']}: dp {layout['dp']}, tp {layout['tp']}, pp {layout['pp']}, "
        f"micro batch {layout['micro_batch_size']}, recompute {layout['recompute']}",
        fontsize=9,
    )
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    try:
        figure.savefig(path, bbox_inches="tight", dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot cannot write {path}: {error}") from error
    pyplot.close(figure)
