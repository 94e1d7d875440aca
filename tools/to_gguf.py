"""Run llama.cpp's converter on a folder of `convert to-hf --native`, whose words it would not know how to cut.

The converter knows a byte-level tokenizer by a hash of the ids of one text. A tokenizer that somebody has trained has
another hash, and so has one whose end of text stands before a text, as in our exports. What llama.cpp needs is the name
of a pattern, and the pattern stands in `tokenizer.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS, _SHORT = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
LLAMA3 = "llama-bpe"
"""The name under which llama.cpp looks a whole word up before it merges; under the others it merges at once."""
PATTERNS = {
    rf"{_WORDS}|\p{{N}}{_TAIL}": "ufakzeka",
    rf"{_SHORT}{_WORDS}|\p{{N}}{_TAIL}": "qwen2",
    rf"{_SHORT}{_WORDS}|\p{{N}}{{1,3}}{_TAIL}": LLAMA3,
}
"""Patterns of words, and llama.cpp's names for them; the first is that of `data tokenizer --kind byte-bpe`."""
GPT2 = "gpt-2"
"""The name of the pattern that the step `ByteLevel` brings along."""
OTHER_PATTERN = "it cuts text into words in another way"


def name_of_pattern(tokenizer: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for how a `tokenizer.json` cuts text into words; None if it is another pattern."""
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    match [step.get("type") for step in steps]:
        case ["ByteLevel"] if steps[0].get("use_regex", True):
            return GPT2
        case ["Split", "ByteLevel"] if not steps[1].get("use_regex", True) and steps[0].get("behavior") == "Isolated":
            return None if steps[0].get("invert") else PATTERNS.get(steps[0].get("pattern", {}).get("Regex"))
        case _:
            return None


def reason_against(tokenizer: dict[str, Any], name: str | None) -> str | None:
    """Say what llama.cpp would do otherwise than a `tokenizer.json`; None if nothing.

    Args:
        tokenizer: Content of the file.
        name: Name of its pattern of words; None if llama.cpp has none.
    """
    model = tokenizer.get("model") or {}
    forms = [step.get("type") for step in _steps(tokenizer.get("normalizer"), "normalizers")]
    spaces = [step.get("add_prefix_space", True) for step in _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")]
    if (kind := model.get("type", "BPE")) != "BPE":
        return f"its model is {kind}, not BPE"
    if forms not in ([], ["NFC"]):
        return f"its normalizer is {' and '.join(map(str, forms))}, not NFC or none"
    if name is None:
        return OTHER_PATTERN
    if spaces[-1]:
        return "it puts a space before a text (add_prefix_space)"
    if model.get("ignore_merges", False) != (name == LLAMA3):
        other = "looks a whole word up before it merges" if name == LLAMA3 else "merges at once"
        return f"its ignore_merges is {model.get('ignore_merges', False)}, where llama.cpp's {name} {other}"
    return None


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """Return the steps of a part of a `tokenizer.json`, which is null, a step, or a sequence of them."""
    return [] if part is None else part.get(inner, [part])


def known_name(known: Callable[[Any, Any], str], reason: str, model: Any, tokenizer: Any) -> str:
    """Ask the converter for the name, by ids without the end of text that our exports put before a text."""
    try:
        return known(model, SimpleNamespace(encode=partial(tokenizer.encode, add_special_tokens=False)))
    except NotImplementedError:
        sys.exit(f"llama.cpp has no name for this tokenizer.json, so no GGUF gives its ids: {reason}")


def main() -> None:
    """Call the converter of a folder of llama.cpp's with the arguments behind it."""
    if len(sys.argv) < 3:
        sys.exit(f"usage: {Path(sys.argv[0]).name} LLAMA_CPP FOLDER [OPTIONS OF convert_hf_to_gguf.py]")
    llama_cpp, folder = Path(sys.argv[1]), Path(sys.argv[2])
    if not (llama_cpp / "convert_hf_to_gguf.py").exists():
        sys.exit(f"{llama_cpp} is no folder of llama.cpp's: it holds no convert_hf_to_gguf.py")
    if (folder / "hopescale.json").exists():
        sys.exit(f"{folder} is an export in hopescale's own form, which has no GGUF: write it by `to-hf --native`")
    sys.path.insert(0, str(llama_cpp))
    converter = import_module("convert_hf_to_gguf")
    text_model = getattr(converter, "TextModel", None) or import_module("conversion.base").TextModel
    file = folder / "tokenizer.json"
    if file.exists():
        tree = json.loads(file.read_text(encoding="utf-8"))
        name = name_of_pattern(tree)
        if reason := reason_against(tree, name):
            asked = partial(known_name, text_model.get_vocab_base_pre, reason)
            text_model.get_vocab_base_pre = lambda self, tokenizer: asked(self, tokenizer)
        else:
            text_model.get_vocab_base_pre = lambda self, tokenizer: name
    sys.argv = ["convert_hf_to_gguf.py", *sys.argv[2:]]
    converter.main()


if __name__ == "__main__":
    main()
