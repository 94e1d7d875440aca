"""The house stays readable: short files, short functions, no drawers for everything, pages of one width."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("hopescale", "tools") for path in (ROOT / folder).rglob("*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "hopescale").rglob("*.md")])
DRAWERS = {"utils", "util", "helpers", "misc"}
NO_NOUNS = {
    *("Of", "What", "Where", "When", "Its", "How", "As", "Which", "Whose", "Whatever"),
    *("From", "To", "In", "On", "At", "With", "By", "For", "Per", "Like", "Is", "Are", "Has"),
}


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
    assert not [line for line in argument_lines(tree) if line.partition(": ")[2].split()[0].rstrip(",") in NO_NOUNS]


def test_no_two_classes_share_a_name():
    trees = [ast.parse(path.read_text()) for path in SOURCES]
    names = Counter(node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def argument_lines(tree: ast.Module) -> Iterator[str]:
    """List the lines of docstrings that begin to describe an argument or an attribute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
            for _, block in re.findall(r"^(Args|Attributes):\n((?: +.*\n?)+)", text, re.MULTILINE):
                yield from re.findall(r"^    (\w+: .+)", block, re.MULTILINE)


def prose_of(page: Path) -> list[str]:
    """Return the lines of a page outside of code and tables."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line for line in text.splitlines() if not line.startswith(("|", "    "))]


def anchors_of(page: Path) -> set[str]:
    """Return the names that links to the headings of a page use."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_of_a_page_are_short_and_its_links_lead_somewhere(page: Path):
    assert not [line for line in prose_of(page) if len(line) > 120]
    for link, _, anchor in re.findall(r"\]\(((?!https?:)[^)#\s]*)(#([^)\s]+))?\)", page.read_text()):
        target = (page.parent / link).resolve() if link else page
        assert target.exists(), f"{link} is not there"
        assert not anchor or anchor in anchors_of(target), f"{link} has no heading {anchor}"
