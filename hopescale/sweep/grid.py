"""The trials of a sweep: every combination of series, sizes, horizons and axes, each as a recipe with overrides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from hopescale.common.errors import ConfigError, Problem
from hopescale.common.paths import display_path, shipped_folder
from hopescale.common.units import parse_count
from hopescale.config.check import check
from hopescale.config.files import find_recipe
from hopescale.config.load import LoadedConfig, load_recipe, load_settings
from hopescale.config.schema import RunConfig
from hopescale.config.values import format_value
from hopescale.cost.flops import flops_per_token
from hopescale.cost.params import count_params
from hopescale.sweep import choice
from hopescale.sweep.branches import branch_off
from hopescale.sweep.expression import evaluate
from hopescale.sweep.schema import SeriesConfig, SweepConfig
from hopescale.sweep.trial import Trial

BATCH, STEPS = "train.global_batch_tokens", "train.steps"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Sweep:
    """A sweep's file and its contents."""

    config: SweepConfig
    path: Path

    @property
    def folder(self) -> Path:
        """Folder of its trials, unless another is chosen."""
        return Path("sweeps") / self.config.name


@dataclass(frozen=True)
class _Point:
    """A place in the grid, from which a trial is made."""

    name: str
    series: str
    labels: dict[str, str]
    recipe: Path
    settings: dict[str, Any]
    rules: dict[str, Any]
    flops: float | None
    tokens: Any


def load_sweep(path: Path) -> Sweep:
    """Read a sweep's file, or a shipped sweep by its name.

    Raises:
        ConfigError: With every key that is unknown, does not fit, or says the same twice.
    """
    shipped = shipped_folder("recipes") / "sweeps"
    found = next((file for file in (path, shipped / path, shipped / f"{path}.yaml") if file.is_file()), None)
    if found is None:
        names = ", ".join(sorted(file.stem for file in shipped.glob("*.yaml")))
        message = "no such sweep file, and no shipped sweep of that name"
        raise ConfigError([Problem(str(path), message, hint=f"shipped sweeps: {names}")])
    sweep = Sweep(load_settings(found, SweepConfig), found)
    if problems := list(_problems(sweep.config)):
        raise ConfigError([replace(problem, origin=display_path(found)) for problem in problems])
    return sweep


def make_trials(sweep: Sweep) -> list[Trial]:
    """Make the trials of a sweep, in the order of its file: series, then sizes, then horizons, then axes.

    Raises:
        ConfigError: With everything that is wrong with any trial's config; each problem names the trials it is in.
    """
    trials, trials_with = [], {}
    for point in _points(sweep):
        trial, problems = _make_trial(point)
        trials.append(trial)
        for problem in problems:
            trials_with.setdefault(problem, []).append(point.name)
    if trials_with:
        raise ConfigError([_with_trials(problem, names) for problem, names in trials_with.items()])
    names = [trial.name for trial in trials]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        hint = "an axis lists a value twice, or values that differ in other characters than letters and digits"
        raise ConfigError(f"{display_path(sweep.path)} makes more than one trial of the name {twice[0]}", hint)
    if sweep.config.choose:
        return choice.choose_axis(trials, sweep.config)
    return branch_off(trials, display_path(sweep.path)) if sweep.config.branch else trials


def _with_trials(problem: Problem, names: list[str]) -> Problem:
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    origin = f"; {problem.origin}" if problem.origin and problem.origin != "command line" else ""
    return replace(problem, origin=f"trial {names[0]}{others}{origin}")


def _problems(sweep: SweepConfig) -> Iterator[Problem]:
    """Yield the problems of a sweep before its trials are made."""
    if not _NAME.fullmatch(sweep.name):
        yield Problem("name", f"{sweep.name!r} cannot name a folder", hint="use letters, digits, '.', '_' and '-'")
    for name, series in (sweep.series or {"": SeriesConfig()}).items():
        if (series.recipe or sweep.recipe) is None:
            yield Problem(f"series.{name}.recipe" if name else "recipe", "no recipe", hint="name one, or set `recipe`")
    if sweep.flops and sweep.tokens:
        yield Problem("tokens", "both flops and tokens decide how long a trial is", hint="leave one out")
    if sweep.branch and not (sweep.flops or sweep.tokens):
        yield Problem("branch", "has no effect: there are no horizons", hint="give flops or tokens, or leave it out")
    for number in sweep.flops:
        if number <= 0:
            yield Problem("flops", f"must be above 0, holds {number:g}")
    for key, values in sweep.axes.items():
        if not values:
            yield Problem(f"axes.{key}", "holds no value")
    yield from choice.problems(sweep)
    yield from _set_twice(sweep)


def _set_twice(sweep: SweepConfig) -> Iterator[Problem]:
    """Keys that two places decide for the same trial, so that one of them would do nothing."""
    rules = {key for part in (sweep, *sweep.series.values()) for key in part.rules}
    given = {f"axes.{key}": (key, rules) for key in sweep.axes}
    given |= {f"sizes.{name}.{key}": (key, rules) for name, size in sweep.sizes.items() for key in size}
    given |= {f"set.{key}": (key, _blind(sweep.rules)) for key in sweep.set}
    for name, own in sweep.series.items():
        given |= {f"series.{name}.set.{key}": (key, _blind({**sweep.rules, **own.rules})) for key in own.set}
    for place, (key, deciding) in given.items():
        if key in deciding:
            yield Problem(place, "has no effect: a rule decides it", hint=f"take {key} out of `rules`, or out of here")
    if sweep.flops or sweep.tokens:
        by = "flops" if sweep.flops else "tokens"
        for place in [*(f"rules.{key}" for key in sorted(rules)), *given]:
            if place.endswith(f".{STEPS}"):
                yield Problem(place, f"has no effect: `{by}` decides it", hint="leave it out")
    for key in sorted(set(sweep.axes) & {key for size in sweep.sizes.values() for key in size}):
        yield Problem(f"axes.{key}", "is also set by `sizes`", hint="leave it out of one of them")


def _blind(rules: Iterable[str]) -> set[str]:
    """Return the keys whose values from elsewhere no rule knows, so that only the rule's counts."""
    return {key for key in rules if not _is_of_size(key) and key not in (BATCH, STEPS)}


def _points(sweep: Sweep) -> Iterator[_Point]:
    config = sweep.config
    default = {Path(config.recipe).stem: SeriesConfig()} if config.recipe else {}
    every_series = config.series or default
    horizons = [(number, None) for number in config.flops] or [(None, text) for text in config.tokens] or [(None, None)]
    axes = [[(key, value) for value in values] for key, values in config.axes.items()]
    for (series, own), size, (flops, tokens), *chosen in product(
        every_series.items(), config.sizes or [None], horizons, *axes
    ):
        labels = {} if size is None else {"size": size}
        if config.flops or config.tokens:
            labels["budget"] = f"{flops:.3g}".replace("e+", "e") if flops else str(tokens)
        labels |= {key: _text(value) for key, value in chosen}
        yield _Point(
            name=_name([series] if len(every_series) > 1 else [], labels, "c" if flops else "d"),
            series=series,
            labels=labels,
            recipe=_find(own.recipe or config.recipe, sweep.path),
            settings={**config.set, **own.set, **config.sizes.get(size, {}), **dict(chosen)},
            rules={**config.rules, **own.rules},
            flops=flops,
            tokens=tokens,
        )


def _name(parts: list[str], labels: Mapping[str, str], letter: str) -> str:
    """Name a trial by the values in which it differs from others: `hope-w32-c1e11-lr0.003`."""
    for key, value in labels.items():
        prefix = {"size": "", "budget": letter}.get(key, key.rpartition(".")[2])
        parts = [*parts, prefix + value]
    return "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", part).strip("_") for part in parts) or "trial"


@cache
def _find(recipe: str, sweep: Path) -> Path:
    beside = sweep.parent / recipe
    return (beside if beside.is_file() else find_recipe(recipe)).resolve()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else format_value(value)


def _make_trial(point: _Point) -> tuple[Trial | None, list[Problem]]:
    """Resolve a trial: the size first, then how long it trains and with which batch, then all that follows from these.

    Returns:
        The trial, or None, and what is wrong with it.
    """
    settings = dict(point.settings)
    if not point.rules and point.flops is None and point.tokens is None:
        settings["name"] = point.name  # nothing follows, so that the recipe is read once
    try:
        of_size = {key: text for key, text in point.rules.items() if _is_of_size(key)}
        config = _load(point.recipe, settings).config
        if of_size:
            settings |= _apply(of_size, _known_of_size(config))
            config = _load(point.recipe, settings).config
        cost = flops_per_token(config.model, config.train.seq_len)
        known = {**_known_of_size(config), "N": count_params(config.model)["total"]}
        tokens = _tokens(point, known, cost)
        if not (has_horizon := tokens is not None):
            tokens = config.train.steps * config.train.global_batch_tokens
        known |= {"D": tokens, "C": tokens * cost}
        settings |= _apply({key: text for key, text in point.rules.items() if key == BATCH}, known)
        known["batch"] = settings[BATCH] if BATCH in point.rules else config.train.global_batch_tokens
        if has_horizon:
            settings[STEPS] = _steps(tokens, known["batch"], "tokens" if point.flops is None else "flops")
        known["steps"] = settings[STEPS] if has_horizon else config.train.steps
        settings |= _apply({key: text for key, text in point.rules.items() if key not in (*of_size, BATCH)}, known)
        loaded = _load(point.recipe, {**settings, "name": point.name})
    except ConfigError as error:
        return None, error.problems or [Problem("recipe", error.message, hint=error.hint)]
    problems = check(loaded.config, loaded.origins)
    if (mirror := loaded.config.checkpoint.mirror) is not None:
        message = f"{mirror} would take the checkpoints of all trials, and give one trial's to another"
        problems.append(Problem("checkpoint.mirror", message, hint="leave it null in a sweep"))
    overrides = _overrides({**settings, "name": point.name})
    return Trial(point.name, point.series, point.labels, point.recipe, overrides, loaded.config), problems


def _is_of_size(key: str) -> bool:
    return key.startswith("model.") or key == "train.seq_len"


def _load(recipe: Path, settings: Mapping[str, Any]) -> LoadedConfig:
    return _load_once(recipe, _overrides(settings))


_load_once = cache(load_recipe)


def _overrides(settings: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(f"{key}={_text(value)}" for key, value in settings.items())


def _known_of_size(config: RunConfig) -> dict[str, float]:
    model = config.model
    names = ("d_model", "num_layers", "num_heads", "vocab_size")
    return {name: getattr(model, name) for name in names} | {"seq_len": config.train.seq_len}


def _tokens(point: _Point, known: Mapping[str, float], cost: int) -> float | None:
    """Return the training tokens that a trial's horizon asks for, None where it has none."""
    if point.flops is not None:
        return point.flops / cost
    if point.tokens is None:
        return None
    try:
        tokens = parse_count(str(point.tokens))
    except ValueError:
        tokens = _evaluate("tokens", point.tokens, known)
    if tokens <= 0:
        raise ConfigError([Problem("tokens", f"must be above 0, {point.tokens} is {tokens:g}")])
    return tokens


def _steps(tokens: float, batch: float, key: str) -> int:
    """Return the steps nearest to a horizon.

    Raises:
        ConfigError: If that is none.
    """
    if batch < 1:
        raise ConfigError([Problem(BATCH, f"must be at least 1, is {batch}")])
    if not (steps := round(tokens / batch)):
        message = f"a trial of {tokens:,.0f} tokens is less than half a step of {batch:,} tokens"
        raise ConfigError([Problem(key, message, hint=f"give more, or smaller steps: {BATCH}")])
    return steps


def _apply(rules: Mapping[str, Any], known: Mapping[str, float]) -> dict[str, float]:
    values = {key: _evaluate(f"rules.{key}", text, known) for key, text in rules.items()}
    return {key: value if isinstance(value, int) else float(f"{value:.6g}") for key, value in values.items()}


def _evaluate(key: str, text: Any, known: Mapping[str, float]) -> float:
    try:
        return evaluate(str(text), known)
    except ValueError as error:
        raise ConfigError([Problem(key, str(error))]) from None


def columns(trials: Iterable[Trial]) -> list[str]:
    """List the labels that trials have, in the order of their first appearance."""
    return list(dict.fromkeys(label for trial in trials for label in trial.labels))
