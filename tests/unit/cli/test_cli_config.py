from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hopescale.cli.config import app
from hopescale.common.errors import ConfigError


def run(*args: str) -> str:
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_show_prints_values_and_origins():
    out = run("show", "hope_tiny", "train.steps=7", "model.cms.levels.slow=null")
    assert "  steps: 7  # command line\n" in out
    assert " slow:" not in out


def test_diff_prints_what_differs():
    out = run("diff", "hope_tiny", "hope_attention_tiny")
    assert "model.mixers.attention.kind: (absent) -> attention" in out.splitlines()
    assert "seq_len" not in out
    assert run("diff", "hope_tiny", "hope_tiny") == "no difference\n"


def test_check_prints_the_plan():
    out = run("check", "hope_tiny", "train.micro_batch_size=4")
    assert out.startswith("ok: ")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines()[1:])
    assert rows["grad_accumulation"] == "8" and rows["total_tokens"] == "16,384,000"
    assert "total 3.97M" in rows["parameters"]


def test_check_raises_every_problem():
    with pytest.raises(ConfigError) as caught:
        run("check", "hope_tiny", "name=a/b", "train.steps=0")
    assert {"name", "train.steps"} <= {problem.key for problem in caught.value.problems}


def test_docs_list_keys_by_prefix():
    out = run("docs", "train.validation")
    assert out.startswith("train.validation.every: int or null = 100\n    Steps between")
    assert "optim" not in out
    assert run("docs").count("\n    ") > 80
    with pytest.raises(ConfigError, match="no key starts with 'nope'"):
        run("docs", "nope")


def test_configs_need_no_torch():
    code = "import sys, hopescale.cli.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
