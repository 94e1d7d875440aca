from __future__ import annotations

import pytest

from hopescale.sweep.expression import evaluate


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e11", 10**11),
        ("20 * N", 2000),
        ("0.02 * (d_model / 64) ** -0.5", 0.02 * 2**0.5),
        ("-N + 7 // 2", -97),
        ("min(max(pow2(N / 3), 8), 16)", 16),
        ("pow2(0.1)", 1),
        ("pow2(45)", 32),
        ("pow2(46)", 64),
        ("multiple(8 / 3 * d_model, 8)", 88),
        ("multiple(1, 8)", 8),
        ("round(2.6)", 3),
        ("sqrt(N)", 10),
    ],
)
def test_values(text: str, value: float):
    found = evaluate(text, {"N": 100, "d_model": 32})
    assert found == pytest.approx(value) and isinstance(found, type(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("N +", "is not an expression"),
        ("steps * 2", "steps is not known here, only N, d_model"),
        ("__import__('os')", "it may hold numbers, names"),
        ("N.real", "it may hold numbers, names"),
        ("[N][0]", "it may hold numbers, names"),
        ("'a' * 3", "it may hold numbers, names"),
        ("True", "it may hold numbers, names"),
        ("(lambda: 1)()", "it may hold numbers, names"),
        ("N / 0", "division by zero"),
        ("9 ** 9 ** 9", "math range error"),
        ("sqrt(-1)", ""),
        ("sqrt(N, N)", "argument"),
        ("1e999", "is inf"),
        ("(-8) ** 0.5", ""),
    ],
)
def test_what_is_no_arithmetic_is_refused(text: str, message: str):
    with pytest.raises(ValueError, match=".*") as caught:
        evaluate(text, {"N": 100, "d_model": 32})
    assert message in str(caught.value) and text in str(caught.value)
