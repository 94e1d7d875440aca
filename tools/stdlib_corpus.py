"""Write the demo corpus: the sources and the help topics of the running Python's standard library, as JSON lines."""

from __future__ import annotations

import json
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

_TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
_TABLE_MARK = "decoding_table = ("  # in the generated character maps of `encodings`
_LEAST_BYTES = 2_000_000


def main() -> None:
    """Write one `{"text", "source"}` object a line, sorted by source, to the file named on the command line."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {Path(sys.argv[0]).name} OUT.jsonl")
    documents = [*sources(Path(sysconfig.get_path("stdlib"))), *topics()]
    size = sum(len(text.encode()) for _, text in documents)
    if size < _LEAST_BYTES:
        sys.exit(f"this Python comes without its sources: found {size:,} bytes of text, need {_LEAST_BYTES:,}")
    out = Path(sys.argv[1])
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for source, text in documents:
            file.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
    print(f"{out}: {len(documents):,} documents, {size / 1e6:.1f} MB of text from Python {sys.version.split()[0]}")


def sources(library: Path) -> Iterator[tuple[str, str]]:
    """Read the modules and packages of the standard library, without tests and generated tables."""
    for name in sorted(sys.stdlib_module_names - {"test", "pydoc_data"}):
        module, package = library / f"{name}.py", library / name
        for path in [module] if module.is_file() else sorted(package.rglob("*.py")):
            relative = path.relative_to(library)
            if _TEST_FOLDERS.isdisjoint(relative.parts):
                with tokenize.open(path) as file:
                    text = file.read()
                if text.strip() and _TABLE_MARK not in text:
                    yield relative.as_posix(), text


def topics() -> Iterator[tuple[str, str]]:
    """Read the language reference that `help()` shows, where this Python has it."""
    try:
        pages = import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name in sorted(pages):
        yield f"help/{name}", pages[name]


if __name__ == "__main__":
    main()
