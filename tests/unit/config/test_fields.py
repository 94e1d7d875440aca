from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from hopescale.config import schema
from hopescale.config.fields import docstrings, field_docs, interval_of
from hopescale.config.schema.ranges import NumberRange
from hopescale.config.values import describe_type, split_optional

SECTIONS = [section for section in vars(schema).values() if dataclasses.is_dataclass(section)]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_field_has_a_docstring(section):
    names = {field.name for field in dataclasses.fields(section)}
    assert names == {name for name, doc in docstrings(section).items() if doc.endswith((".", ":"))}


def test_every_section_of_the_schema_is_exported():
    defined = set()
    for path in Path(schema.__file__).parent.glob("*.py"):
        if path.name == "ranges.py":
            continue
        defined |= {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)}
    assert defined == {section.__name__ for section in SECTIONS}


def test_the_reference_lists_every_field_of_every_section():
    rows = list(field_docs())
    keys = [row.key for row in rows]
    assert len({(row.key, row.kind) for row in rows}) == len(rows)
    for section in SECTIONS:
        for name, hint in get_type_hints(section).items():
            if not dataclasses.is_dataclass(split_optional(hint)[0]):
                assert any(key == name or key.endswith(f".{name}") for key in keys), (section, name)
    row = next(row for row in rows if row.key == "model.head_dim")
    assert (row.type, row.default) == ("int or null", "null") and row.doc.startswith("Width of a head")
    assert {"model.cms.levels", "model.cms.levels.NAME.d_ff", "data.sources.NAME.synthetic.task"} <= set(keys)


def test_every_number_has_a_range():
    for section in SECTIONS:
        for name, hint in get_type_hints(section, include_extras=True).items():
            words = re.findall(r"\w+", describe_type(get_type_hints(section)[name]))
            is_number = not {"int", "float"}.isdisjoint(words)
            assert is_number == (interval_of(hint) is not None), (section, name)


@pytest.mark.parametrize(
    ("interval", "inside", "outside", "words"),
    [
        ("[1, inf)", [1, 10**18], [0, -1, 0.99], "at least 1"),
        ("(0, inf)", [1e-9], [0, -1], "above 0"),
        ("(0, 2]", [2, 1e-9], [0, 2.1], "in (0, 2]"),
        ("[0, 1)", [0, 0.999], [1, -0.1], "in [0, 1)"),
    ],
)
def test_intervals(interval, inside, outside, words):
    assert all(value in NumberRange(interval) for value in inside)
    assert not any(value in NumberRange(interval) for value in outside)
    assert str(NumberRange(interval)) == words


def test_literals_are_texts():
    """Override text is compared verbatim with the choices of a literal."""
    for section in SECTIONS:
        for hint in get_type_hints(section).values():
            inner = split_optional(hint)[0]
            if str(inner).startswith("typing.Literal"):
                assert all(isinstance(choice, str) for choice in get_args(inner))
