"""Figures of a comparison: accuracy by a setting or by step, and loss by place.

This file alone of evals needs matplotlib; nothing is shown on a screen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hopescale.evals.comparison import Comparison, MeasuredPoint, Spread

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9")
"""One for each system (Okabe and Ito's, which most people can tell apart), and again for the next six."""
MARKERS = ("o", "s", "^", "D")
"""One for each six systems."""
STYLES = ("-", "--", ":", "-.")
"""One for each group of further settings."""
LIMITS = {"chance": ":", "best": "--"}
"""Styles of the accuracies between which models lie."""
AXES = {"length": "tokens of an example", "num_pairs": "pairs", "distance": "tokens in between", "step": "step"}
"""What accuracy is drawn over."""
_PANEL = (4.6, 3.6)
_COLUMNS = 3
_LEGEND_LINE = 0.16
"""Inches of a line of the legend."""
_MOST_BANDS = 12
"""Lines of a panel that may have an interval drawn around them; more would cover one another."""
Curve = tuple[str, str, list[tuple[float, Spread]]]
"""System, further settings, and values by place on the axis."""


def draw(comparison: Comparison) -> dict[str, Figure]:
    """Return every figure that has something to show, by the name of its file."""
    figures = {}
    for axis in AXES:
        panels = {suite: list(_curves(comparison, suite, axis)) for suite in _suites(comparison.suites)}
        if panels := {suite: curves for suite, curves in panels.items() if curves}:
            figures["forgetting" if axis == "step" else f"accuracy_by_{axis}"] = _figure(comparison, panels, axis)
    if comparison.positions:
        figures["loss_by_position"] = _positions(comparison)
    return figures


def _suites(measured: Sequence[MeasuredPoint]) -> list[str]:
    return list(dict.fromkeys(one.suite for one in measured))


def _curves(comparison: Comparison, suite: str, axis: str) -> Iterator[Curve]:
    """List the lines of a panel: of each system, points that differ in one setting; at least two of them."""
    lines: dict[tuple[str, str], dict[float, Spread]] = {}
    points = [one for one in comparison.suites if one.suite == suite]
    told_apart = {
        name for name, _ in points[0].settings if len({dict(point.settings).get(name) for point in points}) > 1
    }
    for system in comparison.systems:
        for point in points:
            if system.title not in point.values:
                continue
            settings = dict(point.settings) | {"step": system.step}
            if settings.get(axis) is None:
                continue
            follows = {axis, "shortest"} if axis == "length" else {axis}  # bins of lengths begin where others end
            rest = [f"{name} {settings[name]}" for name in settings if name in told_apart - follows]
            label = system.label if axis == "step" else system.title
            line = lines.setdefault((label, ", ".join(rest)), {})
            line[settings[axis]] = point.values[system.title]["accuracy"]
    for (label, rest), values in lines.items():
        if len(values) > 1:
            yield label, rest, sorted(values.items())


def _figure(comparison: Comparison, panels: Mapping[str, Sequence[Curve]], axis: str) -> Figure:
    figure, axes = _grid(len(panels))
    titles = (system.label if axis == "step" else system.title for system in comparison.systems)
    looks = {title: _look(number) for number, title in enumerate(dict.fromkeys(titles))}
    bands = max(len(curves) for curves in panels.values()) <= _MOST_BANDS
    rests = list(dict.fromkeys(rest for curves in panels.values() for _, rest, _ in curves))
    for panel, (suite, curves) in zip(axes, panels.items(), strict=False):
        for label, rest, values in curves:
            style = STYLES[rests.index(rest) % len(STYLES)]
            _line(panel, values, looks[label] | {"ls": style, "label": f"{label} {rest}".strip()}, bands)
        for name in LIMITS:
            _limit(panel, comparison, suite, axis, name)
        if axis == "length":
            for trained in {system.trained_length for system in comparison.systems}:
                panel.axvline(trained, color="0.8", lw=0.9)
        _label(panel, AXES[axis], "accuracy", suite, [place for *_, line in curves for place, _ in line])
        panel.set_ylim(-0.03, 1.05)
    _legend(figure)
    return figure


def _look(number: int) -> dict[str, str]:
    """Return color and marker of a system by its number."""
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number // len(COLORS) % len(MARKERS)],
    }


def _limit(panel: Axes, comparison: Comparison, suite: str, axis: str, name: str) -> None:
    """Draw the accuracy of a guess, or the best there is, over the same places."""
    points = [one for one in comparison.suites if one.suite == suite]
    limits = {dict(one.settings).get(axis): getattr(one, name) for one in points}
    if axis == "step":
        panel.axhline(limits[None], color="0.5", lw=0.9, ls=LIMITS[name], label=name)
        return
    places = sorted(place for place in limits if place is not None)
    panel.plot(places, [limits[place] for place in places], color="0.5", lw=0.9, ls=LIMITS[name], label=name)


def _positions(comparison: Comparison) -> Figure:
    """Draw the loss over the place in the context, a panel for each text."""
    texts = _suites(comparison.positions)
    figure, axes = _grid(len(texts))
    for panel, text in zip(axes, texts, strict=False):
        ticks: list[float] = []
        for number, system in enumerate(comparison.systems):
            values = []
            for one in comparison.positions:
                if one.suite == text and system.title in one.values:
                    settings = dict(one.settings)
                    middle = (settings["first"] + settings["last"] + 1) / 2
                    values.append((middle, one.values[system.title]["loss"]))
            if values:
                bands = len(comparison.systems) <= _MOST_BANDS
                _line(panel, sorted(values), _look(number) | {"ls": "-", "label": system.title}, bands)
                ticks += [place for place, _ in values]
                panel.axvline(system.trained_length, color="0.8", lw=0.9)
        _label(panel, "place in the context", "loss (nats per token)", text, ticks)
    _legend(figure)
    return figure


def _line(panel: Axes, values: Sequence[tuple[float, Spread]], look: Mapping[str, str], bands: bool) -> None:
    """Draw a line of means; with `bands`, and where a value has one, its interval too."""
    places, means = [place for place, _ in values], [value.mean for _, value in values]
    panel.plot(places, means, ms=3.5, lw=1.5, **look)
    banded = [(place, value) for place, value in values if value.low is not None]
    if bands and banded:
        low, high = [value.low for _, value in banded], [value.high for _, value in banded]
        panel.fill_between([place for place, _ in banded], low, high, color=look["color"], alpha=0.15, lw=0)


def _legend(figure: Figure) -> None:
    """Put one legend for all panels at the right of the figure, which grows to hold it."""
    lines = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, handle)
    width, height = figure.get_size_inches()
    longest = max(len(label) for label in lines)
    figure.set_size_inches(width + 0.6 + 0.062 * longest, max(height, 0.3 + _LEGEND_LINE * len(lines)))
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=7.5, frameon=False)


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(_PANEL[0] * columns, _PANEL[1] * rows), layout="constrained", dpi=120)
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes


def _label(panel: Axes, x: str, y: str, title: str, places: Sequence[float]) -> None:
    """Label a panel; an axis of counts that spans more than a factor of three is logarithmic."""
    if min(places) > 0 and max(places) > 3 * min(places):
        panel.set_xscale("log", base=2)
    ticks = sorted(set(places))
    if len(ticks) <= 8:
        panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.minorticks_off()
    panel.set_xlabel(x)
    panel.set_ylabel(y)
    panel.set_title(title, fontsize=11, loc="left")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25, lw=0.6)
