from __future__ import annotations

from typing import Literal

import pytest

from hopescale.common.errors import ConfigError
from hopescale.config.values import describe_type, format_value, parse_yaml, read_text, read_value

NASTY_TEXTS = [
    "", " ", " x ", "0123", "1e-4", "1_000", "1:30", "0x10", ".5", ".inf", "+1", "=", "<<", "-", "- x", "a: b", "a, b",
    "a #b", "#", "*x", "&x", "!x", "@x", "%x", "'q'", '"', "[x", "{x", "null", "Null", "~", "true", "No", "on", "y",
    "2024-01-01", "a\nb", "é", "data/main", "a b", "nan", "x:", "?", "|", ">", "`", "\\n",
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("0123", str, "0123"),
        ("no", str, "no"),
        ("null", str, "null"),
        ("null", str | None, None),
        ("a=b, c", str | None, "a=b, c"),
        ("64Ki", int, 65536),
        ("1.5M", int, 1_500_000),
        ("1e3", int, 1000),
        ("-1", int, -1),
        ("null", int | None, None),
        ("4e-4", float, 4e-4),
        ("3", float, 3.0),
        ("true", bool, True),
        ("False", bool, False),
        ("b", Literal["a", "b"], "b"),
        ("[0.9, 1e-1]", tuple[float, float], (0.9, 0.1)),
        ("[]", tuple[str, ...], ()),
        ("[k,v]", tuple[Literal["k", "v"], ...], ("k", "v")),
        ("null", tuple[str, ...] | None, None),
        ("auto", int | Literal["auto"], "auto"),
        ("64Ki", int | Literal["auto"], 65536),
    ],
)
def test_override_text_is_read_by_its_type(text, hint, value):
    read = read_text(text, hint)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("3.5", int), ("abc", int), ("", int), ("64ki", int), ("null", int), ("1e999", int), ("yes", bool), ("1", bool),
        ("nan", float), ("inf", float), ("x", float), ("c", Literal["a", "b"]), ("0.9", tuple[float, float]),
        ("[1]", tuple[float, float]), ("[1, 2, 3]", tuple[float, float]), ("[a, ", tuple[str, ...]),
        ("[*.bias]", tuple[str, ...]), ("[1]", tuple[str, ...]), ("${x}", str), ("${", str),
        ("some", int | Literal["auto"]),
    ],
)  # fmt: skip
def test_text_of_another_type_is_refused(text, hint):
    with pytest.raises(ConfigError):
        read_text(text, hint)


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("64k", int, 64_000),
        (1e6, int, 1_000_000),
        (3, float, 3.0),
        ("4e-4", float, 4e-4),
        (["a"], tuple[str, ...], ("a",)),
    ],
)
def test_yaml_values_are_read_by_their_type(value, hint, expected):
    read = read_value(value, hint)
    assert read == expected and type(read) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (True, int),
        (True, float),
        (1.5, int),
        ("true", bool),
        (1, bool),
        (3, str),
        (None, str),
        ({"a": 1}, int),
        (1, Literal["1"]),
    ],
)
def test_yaml_values_of_another_type_are_refused(value, hint):
    with pytest.raises(ConfigError):
        read_value(value, hint)


def test_a_number_for_a_text_is_told_to_be_quoted():
    with pytest.raises(ConfigError) as caught:
        read_value(3, str)
    assert caught.value.message == "expected str, got 3"
    assert caught.value.hint == 'quote it: "3"'


@pytest.mark.parametrize("text", NASTY_TEXTS)
def test_written_text_reads_back(text):
    assert parse_yaml(format_value(text)) == text
    assert parse_yaml(format_value([text, "b"])) == [text, "b"]


@pytest.mark.parametrize("value", [None, True, 0, -3, 1e-8, 1e16, 0.1, [], [1.5, None], {}, {"a": {"b": [1]}}])
def test_written_values_read_back(value):
    read = parse_yaml(format_value(value))
    assert read == value and type(read) is type(value)


def test_types_are_named_as_authors_see_them():
    assert describe_type(int | None) == "int or null"
    assert describe_type(Literal["a", "b"]) == "one of a, b"
    assert describe_type(int | Literal["auto"]) == "int or auto"
    assert describe_type(tuple[float, float]) == "[float, float]"
    assert describe_type(tuple[str, ...] | None) == "[str, ...] or null"
