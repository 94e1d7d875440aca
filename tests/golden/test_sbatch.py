"""Batch scripts of the shipped profiles, whole; `python -m tests.golden.test_sbatch` writes them anew."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hopescale.common.paths import shipped_folder
from hopescale.launch.profile import load_profile
from hopescale.launch.sbatch import BatchJob, render

SCRIPTS = Path(__file__).with_name("sbatch")
PROFILES = sorted(path.stem for path in (shipped_folder("slurm") / "clusters").glob("*.yaml"))
CHAINED = "modules"
"""The profile whose script is one of a chain."""


def script(profile: str) -> str:
    job = BatchJob(
        "hope_170m",
        load_profile(profile, example=True),
        nodes=2,
        run_dir=Path("/data/me/runs/hope 170m"),
        work_dir=Path("/data/me"),
        python="/data/me/.venv/bin/python",
        time="4:00:00",
        chained=profile == CHAINED,
    )
    return render(job)


@pytest.mark.parametrize("profile", PROFILES)
def test_scripts_are_the_same_to_the_letter(profile: str):
    assert script(profile) == (SCRIPTS / f"{profile}.sbatch").read_text()


@pytest.mark.parametrize("profile", PROFILES)
def test_bash_can_read_them(profile: str):
    done = subprocess.run(["bash", "-n"], input=script(profile), text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


if __name__ == "__main__":
    for name in PROFILES:
        (SCRIPTS / f"{name}.sbatch").write_text(script(name))
