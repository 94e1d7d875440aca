"""A pre-trained Qwen3 with its own tokenizer: stacked, its text prepared, trained, generated from, asked, exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from hopescale.data.load_tokenizer import load_tokenizer
from tests.support.json_tokenizers import make_tokenizer

TEXT = "".join(f"note {n}: a level 漢字 keeps {n * n} tokens\n" for n in range(60))
TASK = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with more entries than its tokenizer has ids, as the real ones."""
    folder = tmp_path_factory.mktemp("qwen") / "Qwen3-tiny"
    make_tokenizer("llama3", TEXT.splitlines(), folder, vocab_size=300)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=384, tie_word_embeddings=True, **sizes, **heads)).save_pretrained(folder)
    return folder


def test_a_qwen_learns_from_text_in_its_own_ids(hopescale, qwen: Path, tmp_path: Path):
    def succeed(*args: object) -> str:
        done = hopescale(*args)
        assert done.code == 0, done.err
        return done.out

    text, stacked, run = tmp_path / "notes.txt", tmp_path / "stacked", tmp_path / "run"
    text.write_text(TEXT)
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "rolling.yaml").write_text(TASK.format(file=tmp_path / "task" / "texts.jsonl"))
    (tmp_path / "task" / "texts.jsonl").write_text(json.dumps({"text": "a level 漢字"}))

    levels = ("--as", "hope-attention", "--levels", "fast=1,slow=2")
    said = succeed("convert", "from-hf", qwen, stacked, *levels, "--no-verify")
    assert "the tokenizer is kept: tokenizer.json, end of text <|end_of_text|>" in said
    prepare = ("data", "prepare", text, "--separator", "\\n", "--tokenizer", stacked, "--validation", "0.2")
    said = succeed(*prepare, "--out", tmp_path / "data")
    assert "301 pieces, end of text is 1 <|end_of_text|>" in said and "decoded, all unchanged" in said
    sizes = ("train.steps=2", "train.seq_len=16", "train.global_batch_tokens=32", "optim.schedule.warmup_steps=0")
    data = (f"data.sources.main.path={tmp_path / 'data'}", "data.max_epochs=100", "log.trackers=[]")
    held_out = ("train.validation.tokens=64",)
    said = succeed("train", stacked / "config.yaml", "--init", stacked, "--run-dir", run, *sizes, *data, *held_out)
    assert "bits/byte" in said
    assert succeed("generate", run, "--prompt", "note 1: 漢", "--max-tokens", "4").startswith("note 1: 漢")
    asked = ("--tasks", "rolling,perplexity", "--task-path", tmp_path / "task")
    assert "bits_per_byte" in succeed("eval", run, *asked, "--out", tmp_path / "eval.json")
    succeed("convert", "to-hf", run, tmp_path / "hf", "--no-verify")

    ours, theirs = load_tokenizer(run), AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    for line in TEXT.splitlines()[:9]:
        ids = AutoTokenizer.from_pretrained(qwen)(line, add_special_tokens=False, truncation=False).input_ids
        assert ours.encode(line) == ids == theirs(line).input_ids[1:]
    assert load_tokenizer(tmp_path / "hf").fingerprint == ours.fingerprint


def test_an_end_of_text_that_is_not_named_is_asked_for(hopescale, qwen: Path, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_bytes((qwen / "tokenizer.json").read_bytes())
    (tmp_path / "a.txt").write_text(TEXT)
    prepare = ("data", "prepare", tmp_path / "a.txt", "--tokenizer", tmp_path, "--validation", "0", "--out")
    done = hopescale(*prepare, tmp_path / "data")
    assert done.code == 3 and "'<|end_of_text|>', '<|eot_id|>'" in done.err and "--end-of-text TOKEN" in done.err
    done = hopescale(*prepare, tmp_path / "data", "--end-of-text", "<|eot_id|>", "--split-special-tokens")
    assert "end of text is 2 <|eot_id|> (by --end-of-text)" in done.out
    kept = json.loads((tmp_path / "data" / "tokenizer_config.json").read_text())
    assert kept["eos_token"] == "<|eot_id|>" and kept["split_special_tokens"] is True
