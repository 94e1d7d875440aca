from __future__ import annotations

import json
from pathlib import Path

import pytest

from hopescale.cli.app import main
from hopescale.config.load import load_recipe, to_yaml
from tests.support.fake_slurm import FakeSlurm, record

SWEEP = "name: toy\nrecipe: debug\naxes: {train.steps: [3, 4, 5, 6]}\n"


@pytest.fixture
def sweep(fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Run `hopescale sweep ARGS` beside a sweep of four trials and a cluster that takes every job."""
    fake.answer("sbatch", "100")
    monkeypatch.setattr("hopescale.launch.array.take_snapshot", lambda code: code.mkdir())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(SWEEP)
    (tmp_path / "cpus.yaml").write_text("gpus_per_node: 0\nranks_per_node: 1\n")

    def call(verb: str, *args: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as caught:
            main(["sweep", verb, "toy.yaml", *map(str, args)])
        out, err = capsys.readouterr()
        return caught.value.code or 0, out + err

    return call


def elements(folder: Path) -> list[str]:
    names = sorted((folder / "elements").iterdir(), key=lambda path: int(path.stem))
    return [path.read_text().splitlines()[0].removeprefix("# ") for path in names]


def test_an_array_holds_the_trials_that_are_to_be_trained(sweep, tmp_path: Path):
    folder = tmp_path / "sweeps/toy"
    for name, line in {"steps3": {"step": 3, "val/main/loss": 2.0}, "steps4": {"step": 1, "loss": 2.0}}.items():
        (folder / "trials" / name).mkdir(parents=True)
        (folder / "trials" / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (folder / "trials/steps3/outcome").write_text("done at step 3 of 3\n")
    (folder / "trials/steps4/trial.json").write_text('{"state": "diverged", "starts": 1}')
    code, out = sweep("submit", "--cluster", "cpus.yaml", "--first", 3, "--max-at-once", 1, "--time", 30)
    assert (code, out) == (0, "job 100, trials in sweeps/toy/trials\n")
    assert elements(folder / "array-1") == ["steps5"]
    script = (folder / "array-1/submit.sbatch").read_text()
    assert "--array=0-0%1" in script and "--time=30" in script
    command = (folder / "array-1/elements/0.sh").read_text()
    assert "train.steps=5" in command and f"--run-dir {folder}/trials/steps5" in command and "nproc" not in command
    assert (folder / "sweep.yaml").read_text() == SWEEP


def test_a_trial_that_waits_under_another_name_is_not_submitted_twice(sweep, fake: FakeSlurm):
    assert sweep("submit", "--cluster", "cpus.yaml")[0] == 0
    fake.answer("scontrol", record("100", "PENDING", array="0-3"))
    Path("toy.yaml").write_text(f"{SWEEP}series: {{a: {{}}, b: {{set: {{model.num_layers: 1}}}}}}\n")
    code, out = sweep("submit", "--cluster", "cpus.yaml")
    assert code != 0 and "steps3 is waiting as job 100_0, and toy.yaml makes no trial of this name" in out
    assert len(fake.calls("sbatch")) == 1


def test_only_what_failed_is_submitted(sweep):
    assert sweep("submit", "--cluster", "cpus.yaml", "--only", "failed") == (
        0,
        "nothing to submit: no trial has failed\n",
    )
    code, out = sweep("submit", "--cluster", "cpus.yaml", "--only", "slow")
    assert code == 2 and "--only is slow, but must be failed" in out


def test_trials_that_do_not_split_over_the_ranks_are_refused_before_anything_is_written(sweep, tmp_path: Path):
    (tmp_path / "cpus.yaml").write_text("gpus_per_node: 0\nranks_per_node: 3\n")
    code, out = sweep("submit", "--cluster", "cpus.yaml")
    assert code == 2 and "train.global_batch_tokens" in out
    assert not (tmp_path / "sweeps").exists()


def test_status_tells_what_every_trial_says(sweep, tmp_path: Path):
    run_dir = tmp_path / "sweeps/toy/trials/steps4"
    run_dir.mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text('{"step": 4, "val/main/loss": 2.25, "tps": 1500.0}\n')
    (run_dir / "outcome").write_text("done at step 4 of 4\n")
    code, out = sweep("status")
    rows = [line.split() for line in out.splitlines()]
    assert code == 0 and ["steps4", "done", "4", "4", "2.2500", "1,500"] in rows
    assert ["steps6", "waiting", "0", "6"] in rows
    assert out.splitlines()[-1] == "sweeps/toy: 4 trials, 3 waiting, 1 done"


def test_a_pipe_gets_every_label_whole(sweep, tmp_path: Path):
    size = "a" * 250
    axes = "{model.mixers.hope.adaptive: [[k, v]]}"
    (tmp_path / "toy.yaml").write_text(f"recipe: debug\nsizes: {{{size}: {{}}}}\naxes: {axes}\n")
    code, out = sweep("plan")
    assert code == 0 and "[k, v]" in out and f" {size} " in out


def test_plan_names_data_that_does_not_exist(tmp_path: Path, sweep):
    data = f"{{data.sources.markov: null, data.sources.main.path: {tmp_path}/PLACE}}"
    for place, told in (("nowhere", True), ("", False)):
        text = f"recipe: debug\nsizes: {{a: {{}}}}\nset: {data.replace('PLACE', place)}\n"
        (tmp_path / "toy.yaml").write_text(text)
        code, out = sweep("plan")
        assert code == 0 and (f"note: data {tmp_path}/nowhere does not exist here" in out) == told


def test_a_folder_without_points_is_told_how_to_get_them(tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        main(["sweep", "fit", str(tmp_path)])
    assert "hopescale sweep collect SWEEP.yaml" in capsys.readouterr().err


def test_plan_shows_the_trials_in_the_order_of_the_file(sweep):
    code, out = sweep("plan")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:5]] == ["steps3", "steps4", "steps5", "steps6"]
    assert "\ndebug: 4 trials, " in out and "note: no law can be fitted to them" in out
    assert "\nnote: steps3: level slow is due at no step up to train.steps=3; its weights stay" in out


def test_plan_speaks_of_no_law_where_all_trials_are_of_one_size_and_length(sweep):
    Path("toy.yaml").write_text("name: toy\nrecipe: debug\naxes: {optim.lr: [1e-3, 2e-3]}\n")
    code, out = sweep("plan")
    assert code == 0 and "debug: 2 trials, " in out and "no law" not in out


def test_a_user_s_files_are_not_replaced(sweep, tmp_path: Path):
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "points.csv").write_text("precious")
    for args in (("submit", "--cluster", "cpus.yaml"), ("run",)):
        code, out = sweep(*args, "--sweep-dir", "exp")
        assert code == 5 and "--sweep-dir" in out and "points.csv could be replaced" in out
    assert (tmp_path / "exp" / "points.csv").read_text() == "precious"
    assert {path.name for path in (tmp_path / "exp").iterdir()} == {".lock", "points.csv"}


def test_a_sweep_may_live_beside_its_file(sweep, tmp_path: Path):
    (tmp_path / "exp").mkdir()
    (tmp_path / "toy.yaml").rename(tmp_path / "exp" / "sweep.yaml")
    (tmp_path / "toy.yaml").symlink_to("exp/sweep.yaml")
    assert sweep("submit", "--cluster", "cpus.yaml", "--sweep-dir", "exp")[0] == 0
    assert (tmp_path / "exp" / "sweep.yaml").read_text() == SWEEP


def test_a_sweep_that_was_begun_elsewhere_is_not_just_waiting(sweep, tmp_path: Path):
    assert f"note: there is no sweep folder {tmp_path / 'sweeps/toy'}" in sweep("status")[1]
    (tmp_path / "sweeps" / "toy").mkdir(parents=True)
    assert "note:" not in sweep("status")[1]


def test_trials_that_keep_old_names_and_those_that_are_left_out_are_told(sweep, tmp_path: Path):
    for name, *changed in (("steps3",), ("other", "train.seed=7")):
        config = load_recipe("debug", ["train.steps=3", f"name={name}", *changed]).config
        (run_dir := tmp_path / "sweeps/toy/trials" / name).mkdir(parents=True)
        (run_dir / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "toy.yaml").write_text(SWEEP.replace("}", ", train.seed: [0]}"))
    code, out = sweep("status")
    assert code == 0
    kept = "note: toy.yaml names these trials anew, and they keep their old names: steps3-seed0 is steps3\n"
    left = "note: toy.yaml no longer makes these trials in sweeps/toy/trials, which are left out: other\n"
    assert kept in out and left in out
    assert {"steps3", "steps4-seed0"} <= {line.split()[0] for line in out.splitlines() if line}
