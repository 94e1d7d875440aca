"""A plan as text, short tables with units, and its memory as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table

from hopescale.common.errors import ConfigError
from hopescale.common.units import format_bytes, format_count, format_duration
from hopescale.cost.device_memory import KINDS
from hopescale.cost.estimate import PARTS, Estimator
from hopescale.cost.search import can_be_partitioned

WIDTH = 110
MOST_STAGES = 4
"""Stages that are shown; of more, the first and the last."""
NOTABLY = 1.1
"""Ratio of speeds from which on a larger change is worth a line."""


def report(found: Mapping[str, Any]) -> str:
    """Write the plan of a run."""
    layout, device = found["layout"], found["device"]
    ranks, name, tera = layout["ranks"], device["name"], device["peak_flops"] / 1e12
    where = f"{ranks} x {name}" if name != "cpu" else f"{ranks} rank{'s' if ranks > 1 else ''} on this machine's CPU"
    head = (
        f"{found['name']} on {where}, {format_bytes(device['memory'])} and {tera:.3g} TFLOP/s each\n"
        f"{_degrees(layout)}, micro batch {layout['micro_batch_size']} x {layout['micro_batches']}, "
        f"recompute {layout['recompute']}, {layout['precision']}, {format_count(layout['tokens_per_step'])} tokens a "
        f"step, {format_count(layout['total_tokens'])} in {layout['steps']:,} steps"
    )
    parts = [head, _parameters(found), _flops(found), _memory(found), _recompute(found)]
    if ranks > 1:
        parts.append(_bytes(found))
    return _text([*parts, _time(found)])


def _degrees(layout: Mapping[str, Any]) -> str:
    text = f"dp {layout['dp']}, tp {layout['tp']}, pp {layout['pp']}"
    text = f"cp {layout['cp']}, {text}" if layout["cp"] > 1 else text
    text += f" x {layout['virtual_stages']} slices" if layout["virtual_stages"] > 1 else ""
    text += ", sequence parallel" if layout["sequence_parallel"] else ""
    if layout["node_replicas"]:
        return f"{text}, sharded by nodes of {layout['node_replicas']} replicas"
    return text + (f", zero {layout['zero']}" if layout["zero"] else "")


def _parameters(found: Mapping[str, Any]) -> Group:
    parameters = found["parameters"]
    table = _table("parameters", *parameters["by_part"])
    counts = [format_count(count) if count else "tied" for count in parameters["by_part"].values()]
    table.add_row("", *counts)
    levels = ", ".join(f"{name} {format_count(count)}" for name, count in parameters["by_level"].items())
    per_rank = dict.fromkeys(format_count(count) for count in sorted(parameters["per_rank"], reverse=True))
    return Group(table, f"  by level: {levels}; on a rank: {' or '.join(per_rank)}")


def _flops(found: Mapping[str, Any]) -> Group:
    flops = found["flops_per_token"]
    table = _table("FLOPs per token", *flops["by_part"], "total")
    for name in ("forward", "backward", "executed"):
        values = [part[name] for part in flops["by_part"].values()]
        table.add_row(name, *map(format_count, [*values, sum(values)]))
    each, counted = format_count(flops["total"]), "executed has what is computed again too"
    return Group(table, f"  the model takes {each}, {flops['per_parameter']:.1f} per parameter; {counted}")


def _memory(found: Mapping[str, Any]) -> Group:
    memory = found["memory"]
    stages = memory["stages"]
    shown = list(range(len(stages))) if len(stages) <= MOST_STAGES else [0, 1, len(stages) - 1]
    names = ["a rank"] if len(stages) == 1 else [f"stage {number}" for number in shown]
    table = _table("device memory", *names)
    for kind in KINDS:
        if any(stages[number][kind] for number in shown):
            table.add_row(kind, *(format_bytes(stages[number][kind]) for number in shown))
    table.add_row(
        "at most", *(f"{format_bytes(stages[n]['peak'])} ({stages[n]['moment']})" for n in shown), style="bold"
    )
    usable, fullest = format_bytes(found["device"]["usable"]), max(stage["peak"] for stage in stages)
    lines = [_pace(name, pace) for name, pace in memory["pace"].items()]
    if memory["fits"]:
        return Group(table, *lines, f"  fits: {format_bytes(fullest)} of {usable} that a plan fills")
    lines.append(f"  does not fit: {format_bytes(fullest)}, of {usable} that a plan fills")
    change, fastest = memory["change"], memory["fastest"]
    if change is None:
        lines.append("  nothing that a search looks at fits: a smaller model, or shorter sequences")
    else:
        more = f" on {change['ranks']} devices" if change["ranks"] != found["layout"]["ranks"] else ""
        lines.append(f"  smallest change that fits{more}: {_change(change)}")
        if fastest["estimate"]["tps"] > NOTABLY * change["estimate"]["tps"]:
            lines.append(f"  fastest that fits{more}: {_change(fastest)}; --search shows others")
    return Group(table, *lines)


def _pace(name: str, pace: Mapping[str, Any]) -> str:
    pieces, chunks = pace["pieces"], pace["chunks"]
    of = f"heads of {pieces:,} pieces" if pieces > 1 else "heads"
    row = f"{chunks:,} chunk{'s' * (chunks != 1)} in a row"
    states, filled = format_bytes(pace["state_bytes"]), ""
    if pace["waves"]:
        filled = f" in {pace['waves']:,} wave{'s' * (pace['waves'] != 1)} of {pace['at_once']:,}"
    return f"  memories of {name}: {pace['programs']:,} {of} side by side{filled}, {row}, states of {states} a block"


def _change(change: Mapping[str, Any]) -> str:
    settings = " ".join(_setting(key, value) for key, value in change["settings"].items())
    return f"{settings} ({format_bytes(change['peak'])}, {change['estimate']['tps']:,.0f} tokens/s)"


def _recompute(found: Mapping[str, Any]) -> Table:
    modes = found["memory"]["by_recompute"]
    table = _table("train.recompute", *modes)
    table.add_row("device memory", *(format_bytes(mode["peak"]) for mode in modes.values()))
    table.add_row("tokens/s", *(f"{mode['tps']:,.0f}" for mode in modes.values()))
    return table


def _bytes(found: Mapping[str, Any]) -> Table:
    stages = found["bytes_per_step"]
    shown = [0] if len(stages) == 1 else [0, len(stages) - 1]
    axes = list(dict.fromkeys(axis for number in shown for axis in stages[number]))
    table = _table("bytes sent per step", *axes, "total")
    for number in shown:
        values = [stages[number].get(axis, 0) for axis in axes]
        name = "a rank" if len(stages) == 1 else f"stage {number}"
        table.add_row(name, *map(format_bytes, [*values, sum(values)]))
    return table


def _time(found: Mapping[str, Any]) -> Group:
    estimate, device = found["estimate"], found["device"]["name"]
    parts = [part for part in PARTS if estimate[f"{part}_s"]]
    table = _table("a step, estimated", *parts, "total")
    seconds = (estimate[f"{part}_s"] for part in (*parts, "step"))
    table.add_row("seconds", *(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in seconds))
    hours = f", {format_count(estimate['device_hours'])} {device}-hours" if device != "cpu" else ""
    line = (
        f"  {estimate['tps']:,.0f} tokens/s, {estimate['mfu']:.1%} MFU, {_long(estimate['wall_s'])} for the run{hours}"
    )
    lines = [line]
    if (ratio := found["beside_transformer"]) is not None:
        lines.append(f"  a block takes {1 / ratio:.3g} times as long as that of a Transformer of as many parameters")
    return Group(table, *lines, *_assumed(found["assumptions"]))


def _assumed(assumptions: Sequence[str]) -> list[str]:
    items = (textwrap.wrap(line, WIDTH - 4) for line in assumptions)
    return ["  assumed:", *("  - " + "\n    ".join(item) for item in items)]


def draw_memory(found: Mapping[str, Any], path: Path) -> None:
    """Draw a bar of the memory of each stage of a report, by kind, beside that of the device. Needs matplotlib.

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

    stages, gib = found["memory"]["stages"], 2**30
    device, layout = found["device"], found["layout"]
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
        f"{found['name']}: dp {layout['dp']}, tp {layout['tp']}, pp {layout['pp']}, "
        f"micro batch {layout['micro_batch_size']}, recompute {layout['recompute']}",
        fontsize=9,
    )
    axes.legend(reverse=True, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    try:
        figure.savefig(path, bbox_inches="tight", dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--plot cannot write {path}: {error}") from error
    pyplot.close(figure)


def choices(found: Sequence[Mapping[str, Any]], estimator: Estimator, ranks: int) -> str:
    """Write the ways that a search proposes, best first, and the settings of the best."""
    name = estimator.holdings.config.name
    if not found:
        if not can_be_partitioned(estimator, ranks):
            return (
                f"{name}: model and batch cannot be shared out evenly over {ranks} ranks; another number of devices\n"
            )
        return f"{name}: nothing fits on {ranks} x {estimator.device.name}; more devices, or a smaller model\n"
    columns = ("dp", "tp", "pp", "micro batch", "recompute", "memory", "tokens/s", "MFU", "run")
    table = _table(f"{name} on {ranks} x {estimator.device.name}", *columns)
    for choice in found:
        settings, estimate = choice["settings"], choice["estimate"]
        degrees = [str(settings[f"parallel.{axis}"]) for axis in ("dp", "tp", "pp")]
        how = [str(settings["train.micro_batch_size"]), str(settings["train.recompute"])]
        speed = [f"{estimate['tps']:,.0f}", f"{estimate['mfu']:.1%}", _long(estimate["wall_s"])]
        table.add_row("", *degrees, *how, format_bytes(choice["peak"]), *speed)
    best = " ".join(_setting(key, value) for key, value in found[0]["settings"].items())
    return _text([table, f"  settings of the first: {best}", Group(*_assumed(estimator.assumptions()))])


def size(found: Mapping[str, Any], recipe: str) -> str:
    """Write the size that a scaling law proposes."""
    settings = " ".join(_setting(key, value) for key, value in found["settings"].items())
    return (
        f"{format_count(found['flops'])} FLOPs are best spent on {format_count(found['parameters'])} parameters and "
        f"{format_count(found['tokens'])} tokens: predicted loss {found['loss']:.4f} nats\n"
        f"  {format_count(found['flops_per_token'])} FLOPs per token, counted for this size\n"
        f"  {recipe} {settings}\n"
        + (f"note: the law is in doubt, and this size with it: {found['doubt']}\n" if found["doubt"] else "")
    )


def _setting(key: str, value: object) -> str:
    return f"{key}={str(value).lower() if isinstance(value, bool) else value}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
    table.columns[0].no_wrap = True
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _long(seconds: float) -> str:
    """Write the time of a run; in days from four on."""
    days = seconds / 86_400
    return f"{days:,.0f} days" if days >= 4 else format_duration(seconds)


def _text(parts: Iterable[RenderableType]) -> str:
    console = Console(width=WIDTH, highlight=False, markup=False, no_color=True)
    with console.capture() as capture:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, str))
            console.print()
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).rstrip() + "\n"
