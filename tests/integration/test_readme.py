"""The commands of the README and of the first page of the docs, extracted and run as a reader would type them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "getting_started.md")
BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_commands_of_the_first_pages_run_as_printed(tmp_path: Path):
    for name in ("README.md", "docs"):
        source, target = ROOT / name, tmp_path / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    blocks = [block for page in PAGES for block in BLOCK.findall(page.read_text())]
    assert len(blocks) >= 9
    script = "set -euo pipefail\n" + "\n".join(blocks)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "stopped at step 16 of 32" in result.stdout
    assert "resumed from runs/mine/checkpoints/step-00000016 at step 16" in result.stdout
    assert "A memory" in result.stdout.partition("done: step 32 of 32")[2]
