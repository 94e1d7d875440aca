from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.fake_slurm import NO_ACCOUNTING, FakeSlurm


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Commands of Slurm that answer as they are told; at first they know of nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    fake = FakeSlurm(folder)
    for command in ("scontrol", "sbatch", "scancel"):
        fake.answer(command)
    fake.answer("sacct", error=NO_ACCOUNTING, code=1)
    return fake
