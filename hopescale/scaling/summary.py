"""An analysis in words and as JSON; `law.json` is the latter, and `hopescale.scaling.law.read_law` reads it."""

from __future__ import annotations

import math
from dataclasses import is_dataclass
from typing import Any

import numpy as np

from hopescale.common.units import format_count
from hopescale.scaling.analysis import Analysis, SeriesAnalysis
from hopescale.scaling.best_runs import RunMultiplier
from hopescale.scaling.bootstrap import Interval
from hopescale.scaling.multiplier import Multiplier
from hopescale.scaling.scores import ScoreAnalysis
from hopescale.scaling.views import PowerLaw

AHEAD = (1, 10, 100)
"""Budgets the best size is said for, in multiples of the largest that was run."""
_MINIMUM = ("params", "tokens", "loss", "inside", "params_interval", "loss_interval")


def to_json(analysis: Analysis) -> dict[str, Any]:
    """Return all results for JSON; infinite numbers become null."""
    table = analysis.table
    return {
        "points": {"source": str(table.source), "left_out": table.left_out, "losses_of": table.losses_of},
        "series": {name: _series_json(series) for name, series in analysis.series.items()},
        "reference": analysis.reference,
        "multipliers": _tidy(analysis.multipliers),
        "multipliers_of_runs": _tidy(analysis.of_runs),
        "scores": _scores_json(analysis),
    }


def _scores_json(analysis: Analysis) -> Any:
    scores = analysis.scores
    if not isinstance(scores, ScoreAnalysis):
        return scores
    return _tidy(
        {
            "num_runs": len(scores.loss),
            "curve": scores.curve,
            "correlation": scores.correlation,
            "correlation_interval": scores.correlation_interval,
            "apart": {name: {"mean": mean, "interval": of} for name, (mean, of) in scores.apart.items()},
            "optimal": {
                name: [
                    {"flops": flops, "loss": loss, "score": score, "interval": interval}
                    for flops, loss, score, interval in scores_ahead(series, scores)
                ]
                for name, series in analysis.series.items()
            },
        }
    )


def scores_ahead(series: SeriesAnalysis, scores: ScoreAnalysis) -> list[tuple[float, float, float, Interval | None]]:
    """Return FLOPs, loss, score and the score's interval of one run of the best size, for each of `budgets_ahead`."""
    if series.doubt is not None:
        return []
    found = []
    for flops in budgets_ahead(series):
        best, cost = series.optimum(flops), series.frontier.cost
        likely = [law.loss(*law.optimal(flops, cost)) for law in series.frontier.samples]
        found.append((flops, best.loss, *scores.of_run(best.loss, likely)))
    return found


def _series_json(series: SeriesAnalysis) -> dict[str, Any]:
    forecast = series.forecast
    return _tidy(
        {
            **series.fit.law.to_dict(),
            "intervals": series.intervals(),
            "undetermined": series.fit.undetermined,
            "asymptote": series.fit.asymptote,
            "doubt": series.doubt,
            "objective": series.fit.objective,
            "num_runs": len(series.points),
            "flops": series.frontier.cost,
            "optimal": [] if series.doubt else list(map(series.optimum, budgets_ahead(series))),
            "isoflop": {
                "minima": [
                    {"flops": parabola.flops, "num_runs": len(parabola.points)}
                    | {name: getattr(parabola, name) for name in _MINIMUM}
                    for parabola in series.isoflop.parabolas
                ],
                "params": series.isoflop.params,
                "tokens": series.isoflop.tokens,
            },
            "envelope": {
                "num_runs": len(series.envelope.points),
                "params": series.envelope.params,
                "tokens": series.envelope.tokens,
            },
            "without_largest": forecast
            and {
                **forecast.law.to_dict(),
                "flops": forecast.flops,
                "num_left_out": len(forecast.errors),
                "mean_error": float(np.mean(forecast.errors)),
                "mean_absolute_error": float(np.mean(np.abs(forecast.errors))),
            },
        }
    )


def _tidy(value: Any) -> Any:
    """Replace numbers that JSON does not have."""
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, dict):
        return {name: _tidy(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_tidy(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe(analysis: Analysis) -> list[str]:
    """Return the lines that report the results to a person."""
    table = analysis.table
    num_runs = sum(len(series.points) for series in analysis.series.values())
    lines = [f"{table.source}: {num_runs} runs, {len(table.left_out)} left out"]
    lines += [f"  {line}" for line in table.left_out]
    if note := other_losses(analysis):
        lines.append(f"note: {note}")
    for name, series in analysis.series.items():
        lines += ["", *_describe_series(name, series)]
    for name, multipliers in analysis.multipliers.items():
        lines += ["", f"{name}: the compute that {analysis.reference} needs for the same loss"]
        lines += [
            f"  at {value.flops:.2e} FLOPs, loss {value.loss:.4f}: {times(value)}{between(value.interval)}"
            for value in multipliers
        ]
    for name, values in analysis.of_runs.items():
        lines += ["", f"{name}: the compute that {analysis.reference} needs for the same loss, by the best runs alone"]
        lines += [f"  {value.flops:.2e} FLOPs, loss {value.loss:.4f}: {times_of_runs(value)}" for value in values]
        if name not in analysis.multipliers:
            lines.append("  by the laws: not determined, as a best size is not")
    return lines + ([] if analysis.scores is None else ["", *describe_scores(analysis, analysis.scores)])


def other_losses(analysis: Analysis) -> str | None:
    """Say which series have losses of another text than the reference, with which they do not compare."""
    by_series = analysis.table.losses_of
    wanted = by_series.get(analysis.reference)
    others = [f"those of {name} of {text}" for name, text in by_series.items() if wanted and text != wanted]
    if not others:
        return None
    return f"losses of {analysis.reference} are of {wanted}, {', '.join(others)}: they do not compare"


def describe_scores(analysis: Analysis, scores: ScoreAnalysis | str) -> list[str]:
    """Return lines on the scores of the runs, by their losses."""
    if isinstance(scores, str):
        return [f"scores: {scores}"]
    curve = scores.curve
    lines = [
        f"scores: {len(scores.loss)} runs; rank correlation with the loss {scores.correlation:.3f}"
        f"{between(scores.correlation_interval)}",
        f"  score = {curve.floor:.4g} + {curve.gain:.4g} exp(-{curve.rate:.4g} L), off by "
        f"{np.mean(np.abs(scores.score - curve(scores.loss))):.2g} on average",
    ]
    lines += [
        f"  {name}: {mean:+.3g}{between(interval)} from the curve of all, at equal loss"
        for name, (mean, interval) in scores.apart.items()
    ]
    for name, series in analysis.series.items():
        lines += [
            f"  {name} at {flops:.2e} FLOPs: loss {loss:.4f}, score of one run {score:.3f}{between(interval)}"
            for flops, loss, score, interval in scores_ahead(series, scores)
        ]
    return lines


def times_of_runs(value: RunMultiplier) -> str:
    """Write a multiplier by runs."""
    if value.value is not None:
        return f"{value.value:.3g} times"
    return "its cheapest run is better" if value.reached else "none of its runs is as good"


def times(value: Multiplier) -> str:
    """Write a multiplier."""
    return "never reached" if math.isinf(value.value) else f"{value.value:.3g} times"


def _describe_series(name: str, series: SeriesAnalysis) -> list[str]:
    law, intervals = series.fit.law, series.intervals()
    sizes, tokens = series.points.params, series.points.tokens
    lines = [
        f"{name}: {len(series.points)} runs, {_range(sizes)} parameters, {_range(tokens)} tokens",
        f"  {law_text(series)}",
        *(_number_line(series, key, value, intervals.get(key)) for key, value in law.to_dict().items()),
        f"  a token costs {_cost(series)} FLOPs per parameter",
        f"  residuals: {100 * np.mean(np.abs(series.fit.residuals)):.2g} % of the loss on average",
    ]
    lines += [f"  {line}" for line in [*describe_doubts(series), *describe_growth(series)]]
    for flops in [] if series.doubt else budgets_ahead(series):
        best = series.optimum(flops)
        lines.append(
            f"    {flops:.2e} FLOPs: N {format_count(best.params)}{between(best.params_interval, count=True)}, "
            f"D {format_count(best.tokens)}{between(best.tokens_interval, count=True)}, "
            f"loss {best.loss:.4f}{between(best.loss_interval)}"
            + (f", of one run{between(best.run_interval)}" if best.run_interval else "")
        )
    return lines + [f"  {line}" for line in describe_forecast(series)]


def _number_line(series: SeriesAnalysis, key: str, value: float, interval: Interval | None) -> str:
    is_held = key == "E" and series.fit.asymptote is not None
    return f"    {key:<6} {value:<8.4g}{' (held)' if is_held else between(interval)}"


def describe_doubts(series: SeriesAnalysis) -> list[str]:
    """Return lines on the questions that these runs leave open, and the runs that would answer them."""
    lines = [f"best size for a budget: not determined: {series.doubt}"] if series.doubt else []
    if series.fit and series.fit.undetermined:
        lines.append(f"not determined by these runs: {', '.join(series.fit.undetermined)}")
    parabolas = [parabola for parabola in series.isoflop.parabolas if not parabola.inside]
    best = [parabola.points.params[np.argmin(parabola.points.loss)] for parabola in parabolas]
    for size, other, end in (("smallest", "smaller", np.min), ("largest", "larger", np.max)):
        count = sum(params == end(parabola.points.params) for params, parabola in zip(best, parabolas, strict=True))
        if count:
            lines.append(
                f"at {count} of {len(series.isoflop.parabolas)} budgets the {size} model is the best: "
                f"where the best size lies is not seen, run {other} ones"
            )
    return lines


def describe_growth(series: SeriesAnalysis) -> list[str]:
    """Return how the best size grows with the budget, by each view."""
    by_law = []
    if series.doubt is None:
        intervals = series.intervals()
        exponents = series.fit.law.optimal_exponents(series.frontier.cost)
        powers = "".join(
            f", {name} ~ C^{exponent:.3f}{between(intervals.get(key))}"
            for name, key, exponent in zip("ND", "ab", exponents, strict=True)
        )
        by_law = [f"compute-optimal by law{powers}"]
    isoflop, envelope = series.isoflop, series.envelope
    inside = sum(parabola.inside for parabola in isoflop.parabolas)
    return [
        *by_law,
        f"by isoFLOP minima of {inside} of {len(isoflop.parabolas)} budgets{_powers(isoflop.params, isoflop.tokens)}",
        f"by the {len(envelope.points)} runs of the lower envelope{_powers(envelope.params, envelope.tokens)}",
    ]


def describe_forecast(series: SeriesAnalysis) -> list[str]:
    """Return a line on the forecast of the largest runs by a law fitted without them, where there is one."""
    if series.forecast is None:
        return []
    errors, law = 100 * series.forecast.errors, series.forecast.law
    return [
        f"fitted without the {len(errors)} runs of {series.forecast.flops:.1e} FLOPs and more: E {law.E:.4g}, "
        f"alpha {law.alpha:.3g}, beta {law.beta:.3g}; their loss is {np.mean(errors):+.2f} % off this law on average "
        f"({np.mean(np.abs(errors)):.2f} % without sign)"
    ]


def _cost(series: SeriesAnalysis) -> str:
    """Return the FLOPs per parameter and token from the smallest to the largest size that was run."""
    sizes = series.points.params
    ends = [f"{series.frontier.cost.per_param_token(size):.3g}" for size in (sizes.min(), sizes.max())]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def law_text(series: SeriesAnalysis) -> str:
    """Write a law as a formula."""
    law = series.fit.law
    return f"L = {law.E:.4g} + {law.A:.4g} / N^{law.alpha:.4f} + {law.B:.4g} / D^{law.beta:.4f}"


def budgets_ahead(series: SeriesAnalysis) -> list[float]:
    """Return the largest budget that was run, and the multiples of it in `AHEAD`, FLOPs."""
    return [float(series.points.flops.max()) * ahead for ahead in AHEAD]


def _powers(params: PowerLaw | None, tokens: PowerLaw | None) -> str:
    if params is None or tokens is None:
        return ", too few for a power law"
    laws = (("N", params), ("D", tokens))
    return "".join(f", {name} ~ C^{law.exponent:.3f}{between(law.interval)}" for name, law in laws)


def between(interval: Interval | None, count: bool = False) -> str:
    """Write an interval in brackets after a space; nothing where there is none."""
    if interval is None:
        return ""
    low, high = (format_count(end) if count else f"{end:.4g}" for end in (interval.low, interval.high))
    return f" ({low} to {high})"


def _range(values: np.ndarray) -> str:
    return f"{format_count(float(values.min()))} to {format_count(float(values.max()))}"
