"""Arithmetic in a sweep's file: `0.02 * (d_model / 64) ** -0.5`. Parsed, never evaluated as Python."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping

_OPERATORS: dict[type, Callable[..., float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: math.pow,
    ast.USub: operator.neg,
}


def power_of_two(value: float) -> int:
    """Return the power of two whose logarithm is nearest, at least 1."""
    return 2 ** max(0, round(math.log2(value)))


def multiple(value: float, unit: float) -> float:
    """Return the multiple of `unit` that is nearest, at least one of it."""
    return unit * max(1, round(value / unit))


FUNCTIONS: dict[str, Callable[..., float]] = {
    "min": min,
    "max": max,
    "round": round,
    "sqrt": math.sqrt,
    "log": math.log,
    "pow2": power_of_two,
    "multiple": multiple,
}
"""Functions that an expression may call."""


def evaluate(text: str, known: Mapping[str, float]) -> int | float:
    """Evaluate numbers, the names in `known`, `+ - * / // **`, brackets and `FUNCTIONS`.

    Args:
        text: Expression.
        known: Values by name.

    Returns:
        The value: an int where it is whole.

    Raises:
        ValueError: If it is no such expression, has an unknown name, or has no finite value.
    """
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body, known)
    except SyntaxError:
        raise ValueError(f"{text!r} is not an expression") from None
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ValueError(f"{text!r}: {error}") from None
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is {value}")
    return int(value) if value == int(value) else value


def _value(node: ast.AST, known: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.Name(id=name):
            if name not in known:
                raise ValueError(f"{name} is not known here, only {', '.join(known)}")
            return known[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, known), _value(right, known))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, known)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
            return FUNCTIONS[name](*(_value(arg, known) for arg in args))
    raise ValueError(f"it may hold numbers, names, + - * / // **, and {', '.join(FUNCTIONS)}")
