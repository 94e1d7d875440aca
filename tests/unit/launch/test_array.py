from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hopescale.common.errors import LaunchError
from hopescale.launch.array import Element, Stage, submit_array, submit_stages
from hopescale.launch.ledger import entries
from hopescale.launch.profile import ClusterProfile
from hopescale.launch.status import elements_of_array
from tests.support.fake_slurm import record

PROFILE = ClusterProfile(name="test", gpus_per_node=0, ranks_per_node=1)


@pytest.fixture
def elements(tmp_path: Path) -> list[Element]:
    runs = tmp_path / "sweep" / "runs"
    return [
        Element(f"lr {n}", runs / f"it's {n}", ("train", "debug", f"name=x y{n}", "--run-dir", str(runs / f"it's {n}")))
        for n in range(6)
    ]


def test_an_array_has_a_script_and_a_file_per_element(fake, elements, tmp_path: Path, monkeypatch):
    fake.answer("sbatch", "100")
    monkeypatch.setattr("hopescale.launch.array.take_snapshot", lambda code: code.mkdir())
    folder = tmp_path / "sweep"
    assert submit_array(elements, PROFILE, folder, max_at_once=2, time="30") == ["100"]
    script = (folder / "array-1" / "submit.sbatch").read_text()
    assert "#SBATCH --array=0-5%2\n" in script and f"--output={folder}/array-1/logs/%A_%a.log\n" in script
    assert "#SBATCH --time=30\n" in script and 'scontrol requeue "$job"' in script and "#SBATCH --requeue\n" in script
    assert fake.calls("sbatch") == [f"--parsable {folder}/array-1/submit.sbatch"]

    shown = subprocess.run(
        ["bash", "-c", 'source "$1"; printf "%s\\n" "$run" "${command[@]}"', "-", folder / "array-1/elements/4.sh"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.splitlines() == [str(elements[4].run_dir), *elements[4].command]
    assert elements_of_array(folder) == {element.name: element.run_dir for element in elements}
    (noted,) = entries(elements[4].run_dir)
    assert (noted.job, noted.script) == ("100_4", f"{folder}/array-1/submit.sbatch")
    assert noted.log == f"{folder}/array-1/logs/100_4.log"


def test_a_cluster_without_arrays(fake, elements, tmp_path: Path):
    fake.answer("scontrol", "MaxArraySize            = 0")
    with pytest.raises(LaunchError, match="takes no arrays"):
        submit_array(elements, PROFILE, tmp_path / "sweep")
    assert not fake.calls("sbatch")


def test_an_array_that_is_too_large_is_split(fake, elements, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("hopescale.launch.array.take_snapshot", lambda code: code.mkdir())
    fake.answer("scontrol", "MaxArraySize            = 4")
    fake.answer("sbatch", "100")
    folder = tmp_path / "sweep"
    assert len(submit_array(elements, PROFILE, folder, max_at_once=2)) == 2
    first, second = ((folder / f"array-{part}" / "submit.sbatch").read_text() for part in (1, 2))
    assert "--array=0-3%2\n" in first and "--array=0-1%2\n" in second
    assert "it'\"'\"'s 5" in (folder / "array-2" / "elements" / "1.sh").read_text()
    assert entries(elements[5].run_dir)[-1].job == "100_1"


def test_only_what_failed_is_submitted_again(fake, elements, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("hopescale.launch.array.take_snapshot", lambda code: code.mkdir())
    fake.answer("sbatch", "100")
    folder = tmp_path / "sweep"
    submit_array(elements, PROFILE, folder)
    lines = [
        record("103", "FAILED", array="0", ArrayJobId="100"),
        record("104", "FAILED", array="1", ArrayJobId="100"),
        record("105", "RUNNING", array="2", ArrayJobId="100"),
        record("106", "CANCELLED", array="3", ArrayJobId="100"),
        record("100", "PENDING", array="4-5"),
    ]
    fake.answer("scontrol", "\n".join(lines))
    (elements[0].run_dir / "outcome").write_text("gave up: exit code 9\n")
    (elements[2].run_dir / "outcome").write_text("done at step 5 of 5\n")
    with pytest.raises(LaunchError, match="lr 4 is waiting as job 100_4"):
        submit_array(elements, PROFILE, folder)
    fake.answer("sbatch", "200")
    assert submit_array(elements, PROFILE, folder, only="failed") == ["200"]
    assert [name for name, _ in entries(folder)[-1].elements] == ["lr 0", "lr 1"]
    assert "#SBATCH --array=0-1\n" in (folder / "array-2" / "submit.sbatch").read_text()

    fake.answer("scontrol", "\n".join([record("200", "CANCELLED", array="0-1"), *lines[2:4]]))
    fake.answer("sacct", "")
    assert submit_array(elements[:4], PROFILE, folder, only="failed") == []
    assert submit_array(elements[2:4], PROFILE, folder) == ["200"]  # what was cancelled, but not what is done
    assert [name for name, _ in entries(folder)[-1].elements] == ["lr 3"]


def test_stages_wait_for_the_same_numbers_of_the_stage_before(fake, elements, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("hopescale.launch.array.take_snapshot", lambda code: code.mkdir())
    fake.answer("scontrol", "MaxArraySize            = 3")
    fake.answer("sbatch", "100")
    first, second = {2: elements[0], 3: elements[1]}, {1: elements[2], 2: elements[3], 3: elements[4]}
    folder = tmp_path / "sweep"
    assert len(submit_stages([Stage(first), Stage(second, after=0)], PROFILE, folder)) == 5
    calls = fake.calls("sbatch")
    scripts = [(folder / f"array-{n}" / "submit.sbatch").read_text() for n in range(1, 6)]
    arrays = [next(line for line in script.splitlines() if "--array" in line) for script in scripts]
    assert [line.partition("=")[2] for line in arrays] == ["2-2", "1-1", "2-2", "0-0", "0-0"]
    waits = "--dependency=aftercorr:100 --kill-on-invalid-dep=yes"
    assert [waits in call for call in calls] == [False, False, True, False, True]
    assert (folder / "array-5/elements/0.sh").read_text().startswith(f"# {elements[4].name}\n")
