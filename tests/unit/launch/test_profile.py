from __future__ import annotations

from pathlib import Path

import pytest

from hopescale.common.errors import ConfigError
from hopescale.common.paths import shipped_folder
from hopescale.config.fields import docstrings
from hopescale.launch.profile import ClusterProfile, load_profile, seconds_of


@pytest.fixture
def load(tmp_path: Path, monkeypatch):
    """Read a profile of these lines."""
    monkeypatch.chdir(tmp_path)

    def read(*lines: str) -> ClusterProfile:
        Path("mine.yaml").write_text("\n".join(lines) + "\n")
        return load_profile("mine.yaml")

    return read


def problems(load, *lines: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        load(*lines)
    return {problem.key: f"{problem.message}; {problem.hint}" for problem in caught.value.problems}


def test_a_profile_is_named_by_its_file(load):
    assert load().name == "mine"
    assert load("name: big").name == "big"
    assert load_profile("test").name == "test"


def test_ranks_are_one_per_gpu_unless_set(load):
    assert load("gpus_per_node: 4").ranks == 4
    assert load("gpus_per_node: 4", "ranks_per_node: 2").ranks == 2
    assert load("gpus_per_node: 0", "ranks_per_node: 3").ranks == 3


def test_every_problem_is_told_with_what_may_have_been_meant(load):
    found = problems(load, "partion: gpu", "gpus_per_node: many", "launcher: mpirun", "zzz: 3")
    assert found["partion"] == "unknown key; did you mean partition?"
    assert found["gpus_per_node"].startswith("expected int, got many")
    assert found["launcher"].startswith("expected one of srun, torchrun")
    assert found["zzz"].startswith("unknown key; known here: name, partition")


def test_a_time_that_yaml_takes_for_a_number(load):
    (message,) = problems(load, "time: 12:00:00").values()
    assert message.startswith("12:00:00 is 43200 to YAML") and message.endswith('or "12:00:00" for a text')
    assert problems(load, "time: 30")["time"].endswith('write it in quotes: "12:00:00"')
    assert load('time: "12:00:00"').time == "12:00:00"


@pytest.mark.parametrize(
    ("lines", "key", "message"),
    [
        (["gpus_per_node: 0"], "ranks_per_node", "must be set where gpus_per_node is 0"),
        (["gpus_per_node: 2", "ranks_per_node: 3"], "ranks_per_node", "is 3, but a node has gpus_per_node: 2"),
        (["gpus_per_node: -1", "ranks_per_node: 1"], "gpus_per_node", "must be at least 0, is -1"),
        (["gpus_per_node: 0", "ranks_per_node: 1", "gpu_type: h100"], "gpu_type", "but gpus_per_node is 0"),
        (["cpus_per_node: 4"], "cpus_per_node", "is 4, fewer than the 8 ranks of a node"),
        (["image: x"], "image", "has no effect with container: none"),
        (["mounts: ['/a:/b']"], "mounts", "has no effect with container: none"),
        (["container: pyxis"], "image", "must be set with container: pyxis"),
        (["time: soon"], "time", "'soon' is no time limit"),
        (["env: {2X: y}"], "env.2X", "no name of an environment variable"),
    ],
)
def test_settings_without_sense_or_effect_are_refused(load, lines, key, message):
    assert message in problems(load, *lines)[key]


def test_a_profile_that_is_not_there():
    with pytest.raises(ConfigError) as caught:
        load_profile("h100_pixys")
    assert "did you mean h100_pyxis?" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_profile("zzz")
    assert "a100_apptainer, h100_pyxis, modules, test" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("2:00:05", 7205),
        ("1-0", 86400),
        ("1-2:30", 95400),
        ("1-00:00:01", 86401),
        ("", None),
        ("1h", None),
        ("1:2:3:4", None),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(text, seconds):
    assert seconds_of(text) == seconds


def test_every_setting_is_documented_and_used():
    root = Path(__file__).parents[3]
    reference = (root / "docs" / "slurm.md").read_text()
    users = [*(root / "hopescale" / "launch").glob("*.py"), root / "hopescale" / "cli" / "submit.py"]
    source = "".join(path.read_text() for path in users)
    for name, doc in docstrings(ClusterProfile).items():
        assert f"| `{name}` |" in reference, name
        assert doc.endswith(".")
        assert name in ("name", "ranks_per_node") or f"profile.{name}" in source, name
    assert set(docstrings(ClusterProfile)) == set(ClusterProfile.__dataclass_fields__)


def test_shipped_profiles_say_what_they_are_for():
    for path in (shipped_folder("slurm") / "clusters").glob("*.yaml"):
        assert path.read_text().startswith("# "), path
        load_profile(str(path), example=True)
