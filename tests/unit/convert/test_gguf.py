"""What llama.cpp's converter reads of a native export: how words are cut, and whether a space stands before a text."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from hopescale.convert.tokenizer import write_tokenizer
from hopescale.data.load_tokenizer import load_tokenizer
from hopescale.data.records import Document
from hopescale.data.train_tokenizer import train_tokenizer
from tests.support.json_tokenizers import make_tokenizer

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "README.md").read_text()
TOOL = runpy.run_path(str(ROOT / "tools" / "to_gguf.py"))


CONVERTER = """
import sys
from types import SimpleNamespace

class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        raise NotImplementedError

def main():
    print(sys.argv[1:], TextModel().get_vocab_base_pre(SimpleNamespace(encode=list)))
"""
"""What stands in for llama.cpp's converter: it knows no tokenizer."""


@pytest.mark.parametrize(("kind", "name"), [("ours", "ufakzeka"), ("gpt2", "gpt-2"), ("llama2", None)])
def test_the_pattern_of_a_byte_level_tokenizer_has_a_name_in_llama_cpp(kind: str, name: str | None, tmp_path: Path):
    if kind == "ours":
        train_tokenizer([Document(TEXT, "README.md")], tmp_path / "in", vocab_size=400, kind="byte-bpe")
    else:
        make_tokenizer(kind, TEXT.splitlines(), tmp_path / "in")
    (tmp_path / "out").mkdir()
    write_tokenizer(load_tokenizer(tmp_path / "in"), tmp_path / "out", own_code=False)
    tree = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert TOOL["name_of_pattern"](tree) == name
    assert name is None or TOOL["reason_against"](tree, name) is None
    # llama.cpp's converter takes from here that the end of text stands before a text
    assert "SpecialToken" in tree["post_processor"]["single"][0]


def test_a_sentencepiece_model_that_puts_no_space_says_so(tmp_path: Path):
    train_tokenizer([Document(TEXT, "README.md")], tmp_path / "in", vocab_size=500)
    (tmp_path / "out").mkdir()
    write_tokenizer(load_tokenizer(tmp_path / "in"), tmp_path / "out", own_code=False)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["add_prefix_space"] is False
    assert (tmp_path / "out" / "tokenizer.model").exists()


def test_a_pattern_is_not_all_that_llama_cpp_takes_for_granted(tmp_path: Path, monkeypatch):
    make_tokenizer("gpt2", TEXT.splitlines(), tmp_path / "hf")
    file = tmp_path / "hf" / "tokenizer.json"
    gpt2, reason = json.loads(file.read_text()), TOOL["reason_against"]
    assert reason(gpt2, "gpt-2") is None
    assert reason(gpt2 | {"normalizer": {"type": "NFC"}}, "gpt-2") is None
    lower = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    assert reason(gpt2 | {"normalizer": lower}, "gpt-2") == "its normalizer is NFC and Lowercase, not NFC or none"
    unigram = {"model": {"type": "Unigram"}, "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "always"}}
    assert reason(unigram, TOOL["name_of_pattern"](unigram)) == "its model is Unigram, not BPE"
    pieces = {"model": {"type": "WordPiece"}, "pre_tokenizer": {"type": "BertPreTokenizer"}}
    assert reason(pieces, TOOL["name_of_pattern"](pieces)) == "its model is WordPiece, not BPE"
    assert reason(gpt2 | {"pre_tokenizer": None}, None) == "it cuts text into words in another way"
    spaced = gpt2["pre_tokenizer"] | {"add_prefix_space": True}
    assert reason(gpt2 | {"pre_tokenizer": spaced}, "gpt-2") == "it puts a space before a text (add_prefix_space)"
    whole = gpt2["model"] | {"ignore_merges": True}
    assert reason(gpt2 | {"model": whole}, "llama-bpe") is None
    assert "llama.cpp's gpt-2 merges at once" in reason(gpt2 | {"model": whole}, "gpt-2")
    assert "its ignore_merges is False" in reason(gpt2, "llama-bpe")
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER)
    file.write_text(json.dumps(gpt2 | {"normalizer": lower}))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "convert_hf_to_gguf", raising=False)
    monkeypatch.setattr("sys.argv", ["to_gguf.py", str(tmp_path), str(tmp_path / "hf")])
    with pytest.raises(SystemExit, match="so no GGUF gives its ids: its normalizer is NFC and Lowercase"):
        TOOL["main"]()


def test_the_tool_hands_its_arguments_to_the_converter(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "convert_hf_to_gguf.py").write_text(CONVERTER)
    make_tokenizer("gpt2", TEXT.splitlines(), tmp_path / "hf")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("sys.argv", ["to_gguf.py", str(tmp_path), str(tmp_path / "hf"), "--outtype", "f16"])
    TOOL["main"]()
    assert capsys.readouterr().out == f"{[str(tmp_path / 'hf'), '--outtype', 'f16']} gpt-2\n"
    tree = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    tree["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "hf" / "tokenizer.json").write_text(json.dumps(tree))
    monkeypatch.delitem(sys.modules, "convert_hf_to_gguf")
    monkeypatch.setattr("sys.argv", ["to_gguf.py", str(tmp_path), str(tmp_path / "hf")])
    with pytest.raises(SystemExit, match="no name for this tokenizer.json, .* it cuts text into words in another way"):
        TOOL["main"]()
    (tmp_path / "hf" / "hopescale.json").write_text("{}")
    monkeypatch.setattr("sys.argv", ["to_gguf.py", str(tmp_path), str(tmp_path / "hf")])
    with pytest.raises(SystemExit, match="no GGUF"):
        TOOL["main"]()
