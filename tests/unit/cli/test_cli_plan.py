from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hopescale.cli.app import main
from hopescale.common.paths import shipped_folder
from hopescale.cost.device_memory import KINDS
from tools.plan_tables import gpus_of

ROOT = Path(__file__).parents[3]
RECIPES = sorted(path.stem for path in shipped_folder("recipes").glob("*.yaml"))


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *args])
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def numbers(capsys: pytest.CaptureFixture[str], *args: str):
    code, out, err = run(capsys, *args, "--json")
    found = json.loads(out)
    fits = bool(found) if isinstance(found, list) else found.get("memory", {"fits": True})["fits"]
    assert (code, err) == (0 if fits else 2, "")
    return found


@pytest.mark.parametrize("page", ["README.md", "docs/parallelism.md"])
def test_pages_print_what_plan_says(capsys, page: str):
    block = re.search(r"^ +\$ hopescale plan .+\n(?:(?: {4}.*)?\n)+", (ROOT / page).read_text(), re.M)[0]
    command, *printed = textwrap.dedent(block).splitlines()
    said = iter(run(capsys, *command.split()[3:])[1].splitlines())
    lines = [line for line in printed if line not in ("...", "")]
    assert lines and all(line in said for line in lines)  # `in` goes on from the line before


FEWER_HEADS = {"hope_1.3b_128k": 64}
"""Heads side by side where a step has too few sequences to fill a GPU: here four in all."""


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_shipped_recipe_fits_the_gpus_that_it_names_and_fills_them_with_heads(capsys, recipe: str):
    assert (count := gpus_of(recipe)) or not recipe.endswith(("m", "b", "k"))
    gpus = ["--gpus", str(count)] if count else []
    code, out, err = run(capsys, recipe, "--device", "H100", *gpus)
    assert (code, err) == (0, "")
    assert "tokens/s" in out and "  fits: " in out
    assert max(map(len, out.splitlines())) <= 300
    # At least 97 % of 132 multiprocessors have a head in every wave.
    heads = [
        int(found.replace(",", "")) for found in re.findall(r"^  memories of .+: ([\d,]+) heads side by", out, re.M)
    ]
    assert not count or all(number >= FEWER_HEADS.get(recipe, 128) for number in heads)


def test_the_readme_compares_as_plans_do(capsys):
    linear = ["train.micro_batch_size=16", "model.mixers.hope.memory=linear"]
    ours, lean, other = (
        numbers(capsys, *plan, "--gpus", "8") for plan in (["hope_1.3b"], ["hope_1.3b", *linear], ["transformer_1.3b"])
    )
    speeds = [found["estimate"]["tps"] / other["estimate"]["tps"] for found in (ours, lean)]
    text = "{:.2f} of the tokens/s of `transformer_1.3b` ({:.2f} with linear memories)".format(*speeds)
    assert text in (ROOT / "README.md").read_text()
    text = f"runs at {ours['beside_transformer']:.2f} ({lean['beside_transformer']:.2f})"
    assert text in (ROOT / "README.md").read_text()


def test_a_laptop_reads_of_one_rank(capsys):
    code, out, _ = run(capsys, "debug", "--device", "cpu")
    assert code == 0 and out.startswith("debug on 1 rank on this machine's CPU")
    assert "bytes sent" not in out and "-hours" not in out and "stage" not in out


def test_numbers_add_up(capsys):
    found = numbers(capsys, "hope_170m", "--gpus", "4", "parallel.pp=2")
    for stage in found["memory"]["stages"]:
        assert stage["peak"] == pytest.approx(sum(stage[kind] for kind in KINDS))
    parts = found["parameters"]
    assert sum(parts["by_level"].values()) == parts["by_part"]["total"]
    tied = parts["by_part"]["embedding"]
    assert sum(parts["per_rank"]) == parts["by_part"]["total"] + tied
    estimate = found["estimate"]
    assert estimate["tps"] * estimate["step_s"] == pytest.approx(found["layout"]["tokens_per_step"])
    hours = estimate["step_s"] * found["layout"]["steps"] * 4 / 3600
    assert estimate["device_hours"] == pytest.approx(hours)


def test_what_does_not_fit_is_told_with_a_change_that_does(capsys):
    settings = ["hope_1.3b", "--gpus", "8", "train.recompute=chunks", "train.micro_batch_size=4"]
    found = numbers(capsys, *settings)
    change = found["memory"]["change"]
    assert not found["memory"]["fits"] and change["peak"] <= found["device"]["usable"]
    changed = [f"{key}={value}" for key, value in change["settings"].items()]
    again = numbers(capsys, *settings, *changed)
    assert again["memory"]["fits"]
    found = numbers(capsys, *settings, "--search")
    fastest = again["memory"]["fastest"] or numbers(capsys, *settings)["memory"]["fastest"]
    assert fastest["estimate"]["tps"] == pytest.approx(found[0]["estimate"]["tps"])
    said = run(capsys, *settings)[1]
    assert "smallest change that fits: " + changed[0] in said and "\n  fastest that fits: " in said


def test_a_search_proposes_what_fits_and_can_be_run(capsys):
    found = numbers(capsys, "hope_7b", "--search", "--gpus", "64")
    speeds = [choice["estimate"]["tps"] for choice in found]
    assert speeds == sorted(speeds, reverse=True) and len(found) > 1
    settings = [f"{key}={str(value).lower()}" for key, value in found[0]["settings"].items()]
    again = numbers(capsys, "hope_7b", "--gpus", "64", *settings)
    assert again["memory"]["fits"]
    assert again["estimate"]["tps"] == pytest.approx(speeds[0])


def test_a_search_that_finds_nothing_says_so(capsys):
    code, out, _ = run(capsys, "hope_70b", "--search", "--gpus", "1")
    assert code == 2 and "nothing fits on 1 x H100" in out
    code, out, _ = run(capsys, "debug", "--search", "--gpus", "7")
    assert code == 2 and "cannot be shared out evenly over 7 ranks" in out


def test_4096_devices_are_searched(capsys):
    assert numbers(capsys, "hope_70b", "--search", "--gpus", "4096", "train.global_batch_tokens=64Mi")


def test_the_best_size_of_a_budget(capsys, tmp_path: Path):
    law = tmp_path / "law.json"
    law.write_text(json.dumps({"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}))
    small, large = (numbers(capsys, "hope_170m", "--flops", flops, "--law", str(law)) for flops in ("1e19", "1e21"))
    assert small["parameters"] < large["parameters"] and small["tokens"] < large["tokens"]
    for found in (small, large):
        assert found["tokens"] * found["flops_per_token"] == pytest.approx(found["flops"])
        settings = [f"{key}={value}" for key, value in found["settings"].items()]
        assert numbers(capsys, "hope_170m", *settings)["parameters"]["by_part"]["total"] == found["parameters"]


def test_a_law_in_doubt_is_said(tmp_path: Path, capsys):
    law, numbers_of = tmp_path / "law.json", {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}
    law.write_text(json.dumps({"series": {"a": {**numbers_of, "doubt": "the runs do not determine alpha"}}}))
    _, out, _ = run(capsys, "hope_170m", "--flops", "1e19", "--law", str(law))
    assert "note: the law is in doubt, and this size with it: the runs do not determine alpha" in out
    law.write_text(json.dumps(numbers_of))
    assert "doubt" not in run(capsys, "hope_170m", "--flops", "1e19", "--law", str(law))[1]


def test_a_budget_of_no_step_is_refused(capsys, tmp_path: Path):
    law = tmp_path / "law.json"
    law.write_text(json.dumps({"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}))
    code, out, err = run(capsys, "debug", "--flops", "1e6", "--law", str(law))
    assert (code, out) == (2, "") and "less than half a step of 1,024" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--flops", "1e20"], "--flops and --law go together"),
        (["--flops", "1e20", "--law", "nowhere.json"], "cannot read the law nowhere.json"),
        (["--gpus", "3"], "train.global_batch_tokens"),
        (["--search", "--plot", "memory.png"], "--plot: no effect beside --search"),
        (["--flops", "1e20", "--law", "law.json", "--gpus", "8", "--search"], "--gpus, --search: no effect"),
        (["--flops", "1e20", "--law", "law.json", "--device", "A100"], "--device: no effect beside --flops"),
    ],
)
def test_mistakes_are_one_message(capsys, args: list[str], message: str):
    code, out, err = run(capsys, "hope_170m", *args)
    assert code in (2, 3) and out == "" and message in err and "Traceback" not in err


def test_efficiency_decides_the_time(capsys):
    slow, fast = (numbers(capsys, "transformer_170m", "--efficiency", value) for value in ("0.25", "0.5"))
    # What lies between products takes as long.
    assert 1.5 < slow["estimate"]["compute_s"] / fast["estimate"]["compute_s"] < 2


def test_a_picture_of_the_stages(capsys, tmp_path: Path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "memory.png"
    assert run(capsys, "transformer_170m", "--gpus", "4", "parallel.pp=4", "--plot", str(path))[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    code, _, err = run(capsys, "debug", "--plot", str(tmp_path / "memory.strange"))
    assert code == 2 and "cannot write" in err


def test_a_plan_needs_no_torch():
    code = "import sys; from hopescale.cli.app import main\ntry: main(['plan', 'debug'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_micro_batch_by_itself_is_the_largest_that_fits_the_device(capsys):
    auto = ["hope_1.3b", "--gpus", "8", "train.micro_batch_size=auto"]
    small, large = (
        numbers(capsys, *auto, "train.recompute=memory", "--device", device)["layout"] for device in ("H100", "H200")
    )
    assert (small["micro_batch_size"], large["micro_batch_size"]) == (4, 16)
    assert small["micro_batches"] == 4 * large["micro_batches"]
