"""Figures of an analysis: isoFLOP curves, the fitted surface, residuals, series against each other, loss curves.

This file and `report` alone need matplotlib. Nothing is shown on a screen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from hopescale.common.units import format_count
from hopescale.scaling.analysis import Analysis, SeriesAnalysis
from hopescale.scaling.bootstrap import Interval
from hopescale.scaling.curves import Curve
from hopescale.scaling.multiplier import multiplier
from hopescale.scaling.scores import ScoreAnalysis

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9")
"""One for each series (Okabe and Ito's, which most people can tell apart); more series begin anew."""

_PANEL = (5.2, 4.3)
_AHEAD = 10.0
_GREY = "0.45"
_TIMES = {
    3.0: (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 1.75, 2, 2.5, 3),
    50.0: (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20),
    np.inf: (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50),
}
"""Ticks of multipliers, by the ratio of the ends of the axis up to which they fit."""


def draw(analysis: Analysis, curves: Sequence[Curve] = ()) -> dict[str, tuple[str, Figure]]:
    """Return every figure by file name, with its caption."""
    compared = f" Right: how many times the compute {analysis.reference} needs." if analysis.reference else ""
    captions = {
        "frontier": "What each budget buys: the least loss by law, with its interval, and all runs. "
        f"Dashed: beyond the largest run; dotted: the best runs alone, where a law is not determined.{compared}",
        "isoflop": "Runs of one budget over their size, the parabola through them, and its minimum. "
        "Right: how the best size grows, by minima and by law.",
        "surface": "The fitted law over budget and size. A dot is a run in the colour of its own loss: where it can be "
        "seen, the law misses it. Line: the best size, with its interval.",
        "residuals": "What the law leaves over, in per cent of the loss: above 0 a run is worse.",
        "curves": "Training loss of every run over the compute spent, by size.",
        "scores": "What runs scored over their loss, and the curve of all series, with its interval.",
    }
    figures = {"frontier": _frontier(analysis), "isoflop": _isoflop(analysis)}
    if fitted := {name: series for name, series in analysis.series.items() if series.fit is not None}:
        figures |= {"surface": _surface(fitted), "residuals": _residuals(fitted)}
    if curves:
        figures["curves"] = _curves(analysis, curves)
    if isinstance(analysis.scores, ScoreAnalysis):
        figures["scores"] = _scores(analysis.scores)
    return {name: (captions[name], figure) for name, figure in figures.items()}


def _isoflop(analysis: Analysis) -> Figure:
    """Draw loss over size by budget, a panel for each series, and the growth of the best size."""
    figure, axes = _panels(len(analysis.series) + 1)
    flops = [parabola.flops for series in analysis.series.values() for parabola in series.isoflop.parabolas]
    norm = LogNorm(min(flops, default=1.0) / 1.5, max(flops, default=10.0) * 2.5)
    for axis, (name, series) in zip(axes, analysis.series.items(), strict=False):
        for parabola in series.isoflop.parabolas:
            color = colormaps["viridis"](norm(parabola.flops))
            sizes = np.geomspace(parabola.points.params.min(), parabola.points.params.max(), 100)
            axis.plot(parabola.points.params, parabola.points.loss, "o", ms=4, color=color, alpha=0.8)
            axis.plot(sizes, parabola(sizes), lw=1.6, color=color, label=_flops(parabola.flops))
            if parabola.inside:
                axis.plot(parabola.params, parabola.loss, "D", ms=7, color=color, mec="black", mew=1.2, zorder=5)
        _log_axis(axis, "parameters N", "loss (nats per token)", f"isoFLOP curves: {name}", counts=True)
        if series.isoflop.parabolas:
            axis.legend(title="FLOPs", fontsize=7.5, title_fontsize=8, framealpha=0.8, loc="best", ncols=2)
        else:
            axis.plot(series.points.params, series.points.loss, "o", ms=4, color=_GREY)
    low, high = _share_y(axes[:-1])
    axes[0].set_ylim(low, high + 0.18 * (high - low))
    for color, (name, series) in zip(cycle(COLORS), analysis.series.items(), strict=False):
        _growth(axes[-1], name, series, color)
    if not axes[-1].has_data():
        axes[-1].set_title("compute-optimal size", fontsize=11, loc="left")
        place = {"transform": axes[-1].transAxes, "ha": "center", "va": "center"}
        axes[-1].text(0.5, 0.5, "not determined by these runs", color=_GREY, **place)
        axes[-1].set_axis_off()
        return figure
    _log_axis(axes[-1], "training FLOPs C", "best size N(C)", "compute-optimal size", log_y=True)
    _counts(axes[-1].yaxis)
    axes[-1].legend(fontsize=8, framealpha=0.8, loc="best")
    return figure


def _growth(axis: Axes, name: str, series: SeriesAnalysis, color: str) -> None:
    """Draw the best size over budgets: the minima of a series with intervals, and its law with its band."""
    if series.doubt is None:
        exponent = series.fit.law.optimal_exponents(series.frontier.cost)[0]
        budgets = _budgets(series)
        optima = [series.optimum(flops) for flops in budgets]
        label = f"{name}, law: N ~ C^{exponent:.2f}"
        axis.plot(budgets, [best.params for best in optima], color=color, lw=1.8, label=label)
        _band(axis, budgets, [best.params_interval for best in optima], color)
    fitted = series.isoflop.params
    label = f"{name}, minima" + (f": N ~ C^{fitted.exponent:.2f}" if fitted else "")
    for parabola in series.isoflop.parabolas:
        if not parabola.inside:
            continue
        place, style = (parabola.flops, parabola.params), {"ms": 5.5, "mec": "black", "mew": 0.8, "zorder": 5}
        axis.plot(*place, "D", color=color, label=label, **style)
        label = None
        if parabola.params_interval:
            axis.plot([parabola.flops] * 2, list(_ends(parabola.params_interval)), color=color, lw=1.2, zorder=4)


def _surface(fitted: Mapping[str, SeriesAnalysis]) -> Figure:
    """Draw the law's loss over budget and size, with the runs and the best size, a panel for each series."""
    figure, axes = _panels(len(fitted), width=1.15)
    losses = np.concatenate([series.points.loss for series in fitted.values()])
    low, high = losses.min(), min(losses.max(), np.quantile(losses, 0.97) * 1.1)
    levels = MaxNLocator(14).tick_values(low, high)
    for axis, (name, series) in zip(axes, fitted.items(), strict=True):
        points, law, cost = series.points, series.fit.law, series.frontier.cost
        flops = np.geomspace(points.flops.min() / 1.5, points.flops.max() * 3, 160)
        params = np.geomspace(points.params.min() / 1.6, points.params.max() * 1.6, 160)
        x, y = np.meshgrid(flops, params)
        surface = law.loss(y, x / (cost.scale * y ** (1 + cost.growth)))
        filled = axis.contourf(x, y, surface, levels=levels, cmap="viridis_r", extend="both")
        axis.contour(x, y, surface, levels=levels, colors="white", linewidths=0.5, alpha=0.6)
        style = {"s": 26, "edgecolors": "white", "linewidths": 0.7, "zorder": 4}
        axis.scatter(points.flops, points.params, c=points.loss, cmap=filled.cmap, norm=filled.norm, **style)
        optima = [] if series.doubt else [series.optimum(budget) for budget in flops[::8]]
        axis.plot(flops[::8][: len(optima)], [best.params for best in optima], color="black", lw=1.8, zorder=3)
        for end in ("low", "high"):
            ends = [getattr(best.params_interval, end) for best in optima if best.params_interval]
            axis.plot(flops[::8][: len(ends)], ends, color="black", lw=0.8, ls="--", zorder=3)
        axis.set_xlim(flops[0], flops[-1])
        axis.set_ylim(params[0], params[-1])
        _log_axis(axis, "training FLOPs C", "parameters N", f"fitted law: {name}", log_y=True, grid=False)
        _counts(axis.yaxis)
        figure.colorbar(filled, ax=axis, label="loss (nats per token)")
    return figure


def _residuals(fitted: Mapping[str, SeriesAnalysis]) -> Figure:
    """Draw observed against predicted loss, and the residuals by size, tokens and budget."""
    figure, axes = _panels(3)
    for number, (color, (name, series)) in enumerate(zip(cycle(COLORS), fitted.items(), strict=False)):
        percent, points = 100 * series.fit.residuals, series.points
        said = f"{name}: {np.mean(np.abs(percent)):.2g} % on average"
        for axis, values in zip(axes, (points.params, points.tokens, points.flops), strict=True):
            axis.plot(values, percent, "os^Dv*"[number % 6], ms=4.5, color=color, alpha=0.65, mew=0, label=said)
    everything = np.abs(np.concatenate([100 * series.fit.residuals for series in fitted.values()]))
    shown = max(1e-4, min(everything.max(), 4 * np.quantile(everything, 0.9))) * 1.15
    for axis, what in zip(axes, ("parameters N", "tokens D", "training FLOPs C"), strict=True):
        axis.axhline(0, color="black", lw=1)
        axis.set_ylim(-shown, shown)
        y, title = ("observed over predicted loss, %", "residuals") if axis is axes[0] else ("", "")
        _log_axis(axis, what, y, title, counts=what[-1] != "C")
        if beyond := int(np.sum(everything > shown)):
            axis.text(0.02, 0.02, f"{beyond} beyond", transform=axis.transAxes, fontsize=8, color=_GREY)
    axes[0].legend(fontsize=8, frameon=False, loc="upper right")
    return figure


def _frontier(analysis: Analysis) -> Figure:
    """Draw the least loss over budgets of every series, and the multipliers over the reference."""
    figure, axes = _panels(2 if analysis.of_runs else 1, width=1.25)
    for color, (name, series) in zip(cycle(COLORS), analysis.series.items(), strict=False):
        points, budgets, best = series.points, _budgets(series), series.envelope.points
        axes[0].plot(points.flops, points.loss, "o", ms=3.5, color=color, alpha=0.4, mew=0)
        if series.doubt is not None:
            axes[0].plot(best.flops, best.loss, ":", color=color, lw=1.4, label=f"{name}, best runs (no law)")
            continue
        optima = [series.optimum(flops) for flops in budgets]
        inside = sum(flops <= points.flops.max() * 1.001 for flops in budgets)
        axes[0].plot(budgets[:inside], [best.loss for best in optima[:inside]], color=color, lw=2, label=name)
        axes[0].plot(budgets[inside - 1 :], [best.loss for best in optima[inside - 1 :]], color=color, lw=2, ls="--")
        _band(axes[0], budgets, [best.loss_interval for best in optima], color)
    _log_axis(axes[0], "training FLOPs C", "loss (nats per token)", "least loss for a budget")
    axes[0].plot([], [], "o", ms=3.5, color=_GREY, alpha=0.6, label="runs")
    axes[0].legend(fontsize=9, frameon=False, loc="upper right")
    if analysis.of_runs:
        _multipliers(axes[1], analysis)
    return figure


def _multipliers(axis: Axes, analysis: Analysis) -> None:
    """Draw each series' multiplier over the reference, over the budgets that both were run with."""
    reference = analysis.series[analysis.reference]
    colors = dict(zip(analysis.series, cycle(COLORS), strict=False))
    axis.axhline(1, color=colors[analysis.reference], lw=2, label=analysis.reference)
    ends = []
    for name, values in analysis.multipliers.items():
        budgets = np.geomspace(values[0].flops, values[-1].flops, 25)
        results = [multiplier(analysis.series[name].frontier, reference.frontier, flops) for flops in budgets]
        axis.plot(budgets, [one.value for one in results], color=colors[name], lw=2, label=name)
        _band(axis, budgets, [one.interval for one in results], colors[name])
        last = results[-1]
        if np.isfinite(last.value):
            style = {"xytext": (-4, 8), "ha": "right", "textcoords": "offset points", "weight": "bold"}
            axis.annotate(f"{last.value:.2g} times", (last.flops, last.value), color=colors[name], **style)
        ends += [value for one in results for value in (one.value, *_ends(one.interval)) if 0 < value < np.inf]
    for name, values in analysis.of_runs.items():
        known = [one for one in values if one.value is not None]
        places = [one.flops for one in known], [one.value for one in known]
        axis.plot(*places, "D", ms=5, color=colors[name], mec="black", mew=0.6, label=f"{name}, best runs")
        ends += places[1]
    y, title = f"compute {analysis.reference} needs / C", f"effective-compute multiplier over {analysis.reference}"
    _log_axis(axis, "training FLOPs C of the series", y, title, log_y=True)
    low, high = max(min([0.8, *ends]) / 1.1, 0.02), min(max([1.25, *ends]) * 1.2, 50)
    ticks = next(ticks for ratio, ticks in _TIMES.items() if high / low <= ratio)
    axis.set_yticks([tick for tick in ticks if low <= tick <= high])
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.set_ylim(low, high)
    axis.legend(fontsize=9, frameon=False, loc="upper left")


def _curves(analysis: Analysis, curves: Sequence[Curve]) -> Figure:
    """Draw the loss of every run over the compute spent, coloured by size, a panel for each series."""
    figure, axes = _panels(len(analysis.series), width=1.15)
    sizes = [curve.params for curve in curves]
    norm = LogNorm(min(sizes), max(max(sizes), min(sizes) * 1.01))
    ends = [curve.loss[len(curve.loss) // 10 :].max() for curve in curves], [curve.loss.min() for curve in curves]
    for axis, (name, series) in zip(axes, analysis.series.items(), strict=True):
        own = sorted((curve for curve in curves if curve.series == name), key=lambda curve: -curve.params)
        for curve in own:
            color = colormaps["plasma_r"](0.1 + 0.85 * norm(curve.params))
            axis.plot(curve.flops, curve.loss, color=color, lw=1.1, alpha=0.9)
            axis.plot(curve.flops[-1], curve.loss[-1], "o", ms=4, color=color, mec="black", mew=0.5, zorder=4)
        for params in sorted({curve.params for curve in own}):
            color = colormaps["plasma_r"](0.1 + 0.85 * norm(params))
            axis.plot([], [], color=color, lw=2, label=format_count(params))
        best = []
        if series.doubt is None:
            budgets = np.geomspace(series.points.flops.min(), series.points.flops.max(), 40)
            best = [series.fit.law.best_loss(flops, series.frontier.cost) for flops in budgets]
            axis.plot(budgets, best, color="black", lw=1.8, ls="--", label="law, best size")
        axis.set_ylim(min(*ends[1], *best) * 0.98, max(ends[0]) * 1.02)
        _log_axis(axis, "training FLOPs spent", "loss (nats per token)", f"loss of the runs: {name}")
        axis.legend(title="parameters", fontsize=8, title_fontsize=8, frameon=False, loc="lower left")
    _share_y(axes)
    return figure


def _scores(scores: ScoreAnalysis) -> Figure:
    """Draw scores over losses, by series, and the curve of all with the interval of reweighted fits."""
    figure, (axis,) = _panels(1, width=1.3)
    losses = np.linspace(scores.loss.min(), scores.loss.max(), 200)
    for color, name in zip(cycle(COLORS), dict.fromkeys(scores.series.tolist()), strict=False):
        own = scores.series == name
        axis.plot(scores.loss[own], scores.score[own], "o", ms=4.5, color=color, label=name)
    axis.plot(losses, scores.curve(losses), color=_GREY, lw=1.8)
    if scores.samples:
        drawn = np.array([curve(losses) for curve in scores.samples])
        _band(axis, losses, [Interval.of(column) for column in drawn.T], _GREY)
    axis.set(xlabel="loss (nats per token)", ylabel="score")
    axis.set_title("scores by loss", fontsize=11, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, lw=0.6)
    axis.legend(fontsize=8, framealpha=0.8, loc="best")
    return figure


def _panels(count: int, width: float = 1.0) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_PANEL[0] * width * count, _PANEL[1]), layout="constrained", dpi=120)
    axes = figure.subplots(1, count, squeeze=False)[0]
    return figure, list(axes)


def _share_y(axes: Sequence[Axes]) -> tuple[float, float]:
    """Give panels one range of y; return it."""
    low = min(axis.get_ylim()[0] for axis in axes)
    high = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes[1:]:
        axis.sharey(axes[0])
    axes[0].set_ylim(low, high)
    return low, high


def _log_axis(
    axis: Axes, x: str, y: str, title: str, *, log_y: bool = False, counts: bool = False, grid: bool = True
) -> None:
    """Label a panel and make its x axis, and its y axis if asked, logarithmic."""
    axis.set_xscale("log")
    if log_y:
        axis.set_yscale("log")
    if counts:
        _counts(axis.xaxis)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title, fontsize=11, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    if grid:
        axis.grid(alpha=0.25, lw=0.6)


def _counts(axis) -> None:
    """Write the numbers of a logarithmic axis as 30M, 100M, 300M, or closer where it is short."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 3) if high > 30 * low else (1, 2, 5), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    axis.set_minor_formatter(NullFormatter())


def _budgets(series: SeriesAnalysis) -> np.ndarray:
    """Return budgets over those that were run, which end at one of them, and ten times beyond."""
    low, high = series.points.flops.min(), series.points.flops.max()
    return np.concatenate([np.geomspace(low, high, 30), np.geomspace(high, high * _AHEAD, 12)[1:]])


def _band(axis: Axes, x: Sequence[float], intervals: Sequence[Interval | None], color: str) -> None:
    pairs = [list(_ends(interval)) for interval in intervals]
    if all(pairs):
        low, high = np.nan_to_num(np.array(pairs).T, posinf=1e30)
        axis.fill_between(x, low, high, color=color, alpha=0.16, lw=0)


def _ends(interval: Interval | None) -> Iterator[float]:
    if interval is not None:
        yield from (interval.low, interval.high)


def _flops(value: float) -> str:
    return f"{value:.2g}".replace("e+", "e")
