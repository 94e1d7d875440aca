"""The house stays readable: short files, short functions, no drawers for everything."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("hopescale", "tools") for path in (ROOT / folder).rglob("*.py"))
DRAWERS = {"utils", "util", "helpers", "misc"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_are_short_and_documented(path: Path):
    text = path.read_text()
    tree = ast.parse(text)
    limit = 150 if path.is_relative_to(ROOT / "tools") else 400
    assert len(text.splitlines()) <= limit
    assert not DRAWERS & set(path.with_suffix("").parts)
    assert ast.get_docstring(tree), "a module says in its first line what it owns"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 80, f"{node.name} is too long to be seen at once"
    public = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_"]
    assert all(map(ast.get_docstring, public)), [node.name for node in public if not ast.get_docstring(node)]
