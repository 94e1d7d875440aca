from __future__ import annotations

import json
import math

import pytest

from hopescale.common.errors import DataError
from hopescale.scaling.law import Cost, Law, read_law

CHINCHILLA = Law(E=1.8172, A=482.01, alpha=0.3478, B=2085.43, beta=0.3658)


@pytest.mark.parametrize("growth", [0.0, -0.2, 0.3])
def test_optimal_is_the_best_of_its_budget(growth):
    params, tokens = CHINCHILLA.optimal(1e21, Cost(6.5, growth))
    assert 6.5 * params ** (1 + growth) * tokens == pytest.approx(1e21)
    best = CHINCHILLA.loss(params, tokens)
    for factor in (0.5, 0.99, 1.01, 2.0):
        assert CHINCHILLA.loss(params * factor, tokens / factor ** (1 + growth)) > best
    ten_times = CHINCHILLA.optimal(1e22, Cost(6.5, growth))
    grown = math.log10(ten_times[0] / params), math.log10(ten_times[1] / tokens)
    assert grown == pytest.approx(CHINCHILLA.optimal_exponents(Cost(6.5, growth)))


def test_optimal_at_the_budget_of_chinchilla_is_near_its_70b_on_1400b_tokens():
    params, tokens = CHINCHILLA.optimal(6 * 70e9 * 1.4e12)
    assert params == pytest.approx(70e9, rel=0.1)
    assert tokens == pytest.approx(1.4e12, rel=0.1)


def test_budget_for_a_loss_is_the_way_back():
    for growth in (0.0, -0.2):
        loss = CHINCHILLA.loss(*CHINCHILLA.optimal(3e20, Cost(7.0, growth)))
        assert CHINCHILLA.flops_for(loss, Cost(7.0, growth)) == pytest.approx(3e20)
    assert CHINCHILLA.flops_for(1.8) == math.inf


def test_a_law_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "law.json"
    path.write_text(json.dumps(CHINCHILLA.to_dict()))
    assert read_law(path) == CHINCHILLA
    path.write_text(json.dumps({"series": {"hope": CHINCHILLA.to_dict() | {"num_points": 12}}}))
    assert read_law(path) == read_law(path, "hope") == CHINCHILLA


GOOD = CHINCHILLA.to_dict()


@pytest.mark.parametrize(
    ("text", "series", "message"),
    [
        ("{", None, "is not JSON"),
        ("[]", None, "lacks all of its numbers"),
        (json.dumps({"E": 1, "A": 2}), None, "lacks alpha, B, beta"),
        (json.dumps(GOOD | {"beta": "x"}), None, "beta of the law in"),
        (json.dumps(GOOD | {"beta": math.nan}), None, "beta of the law in"),
        (json.dumps(GOOD | {"A": -1}), None, "must be above 0"),
        (json.dumps({"series": {"a": GOOD, "b": GOOD}}), None, "holds 2 laws"),
        (json.dumps({"series": {"a": GOOD}}), "b", "has no law for b, only for a"),
        (json.dumps(GOOD), "b", "without a name"),
    ],
)
def test_a_bad_file_is_one_message(tmp_path, text, series, message):
    path = tmp_path / "law.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_law(path, series)


def test_a_missing_file_is_one_message(tmp_path):
    with pytest.raises(DataError, match="cannot read the law"):
        read_law(tmp_path / "law.json")
