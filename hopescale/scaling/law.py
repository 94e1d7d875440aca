"""The scaling law `L = E + A/N^alpha + B/D^beta`: its value, and the best size for a budget. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from hopescale.common.errors import DataError

FLOPS_PER_PARAM_TOKEN = 6.0
"""Training FLOPs per parameter and token of a Transformer, where a table or a caller says nothing better."""


@dataclass(frozen=True)
class Cost:
    """FLOPs of training, `scale * params^(1 + growth) * tokens`.

    What a token costs per parameter is not the same for all sizes: a memory's chunks, attention's scores and an
    embedding that is only looked up weigh differently in small models.
    """

    scale: float = FLOPS_PER_PARAM_TOKEN
    growth: float = 0.0

    def per_param_token(self, params: float) -> float:
        """Return the FLOPs per parameter and token of a size."""
        return self.scale * params**self.growth


SIX_N_D = Cost()


@dataclass(frozen=True)
class Law:
    """The loss of a model of N parameters after D tokens (Hoffmann et al., arXiv 2203.15556, Eq. 2).

    What counts as a parameter is decided by the table the law was fitted to; the same count must be used with it.
    """

    E: float
    """Loss that neither size nor data removes, nats per token."""
    A: float
    alpha: float
    """Exponent of the size, as `A` is its scale."""
    B: float
    beta: float
    """Exponent of the data, as `B` is its scale."""

    def loss(self, params: float, tokens: float) -> float:
        """Return the predicted loss in nats per token."""
        return self.E + self.A * params**-self.alpha + self.B * tokens**-self.beta

    def optimal(self, flops: float, cost: Cost = SIX_N_D) -> tuple[float, float]:
        """Return the parameters and tokens of least loss for a budget of training FLOPs."""
        product, power = flops / cost.scale, 1 + cost.growth
        log_ratio = math.log(self.alpha * self.A) - math.log(power * self.beta * self.B)
        params = math.exp((log_ratio + self.beta * math.log(product)) / (self.alpha + power * self.beta))
        return params, product / params**power

    def best_loss(self, flops: float, cost: Cost = SIX_N_D) -> float:
        """Return the least loss for a budget."""
        return self.loss(*self.optimal(flops, cost))

    def optimal_exponents(self, cost: Cost = SIX_N_D) -> tuple[float, float]:
        """Return `a` and `b` of the best `N ~ C^a` and `D ~ C^b`."""
        total = self.alpha + (1 + cost.growth) * self.beta
        return self.beta / total, self.alpha / total

    def flops_for(self, loss: float, cost: Cost = SIX_N_D) -> float:
        """Return the least training FLOPs that reach a loss: the inverse of `best_loss`.

        Infinite where the loss is not above `E`, or by less than numbers can say.
        """
        if loss <= self.E:
            return math.inf
        exponent = self.beta * self.optimal_exponents(cost)[1]
        try:
            return cost.scale * ((self.best_loss(cost.scale, cost) - self.E) / (loss - self.E)) ** (1 / exponent)
        except OverflowError:
            return math.inf

    def to_dict(self) -> dict[str, float]:
        """Return the five numbers by name, as `read_law` takes them."""
        return asdict(self)


def read_law(path: Path, series: str | None = None) -> Law:
    """Read a law from the `law.json` that `hopescale sweep fit` writes, or from a file of the five numbers alone.

    Args:
        path: A JSON object with `E A alpha B beta`, or with `series`: an object of such objects by name.
        series: Name of the series; may be left out where there is one.

    Raises:
        DataError: If the file is missing, is no JSON, lacks a number, or holds several series and none is chosen.
    """
    return _read_numbers(_content(path, series), path)


def read_doubt(path: Path, series: str | None = None) -> str | None:
    """Read why the law of a file that `read_law` has read tells no best size; None where none is said.

    Args:
        path: File of the law.
        series: Name of the series; may be left out where there is one.
    """
    doubt = _content(path, series).get("doubt")
    return doubt if isinstance(doubt, str) and doubt else None


def _content(path: Path, series: str | None) -> Any:
    """Return the object of one law, unchecked."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise DataError(f"cannot read the law {path}: {error.strerror or error}", _HINT) from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}", _HINT) from error
    if isinstance(content, dict) and isinstance(content.get("series"), dict):
        return _one_series(content["series"], series, path)
    if series is not None:
        raise DataError(f"{path} holds one law without a name, but series {series} is asked for", "leave it out")
    return content


_HINT = "write one with: hopescale sweep fit SWEEP, or give a JSON object with E, A, alpha, B and beta"


def _one_series(laws: Mapping[str, Any], series: str | None, path: Path) -> Any:
    names = ", ".join(laws)
    if series is None and len(laws) != 1:
        raise DataError(f"{path} holds {len(laws)} laws ({names}), and none is chosen", "name the series")
    if series is not None and series not in laws:
        raise DataError(f"{path} has no law for {series}, only for {names}")
    return laws[series] if series is not None else next(iter(laws.values()))


def _read_numbers(content: Any, path: Path) -> Law:
    names = [field.name for field in fields(Law)]
    if not isinstance(content, dict) or (missing := [name for name in names if name not in content]):
        lacking = ", ".join(missing) if isinstance(content, dict) else "all of its numbers"
        raise DataError(f"the law in {path} lacks {lacking}", _HINT)
    for name in names:
        value = content[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f"{name} of the law in {path} is {value!r}, but must be a number", _HINT)
        if name != "E" and value <= 0:
            raise DataError(f"{name} of the law in {path} is {value:g}, but must be above 0", _HINT)
    return Law(*(float(content[name]) for name in names))
