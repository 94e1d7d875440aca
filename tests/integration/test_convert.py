"""`hopescale convert` on models trained on four ranks, read by transformers where hopescale cannot be imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hopescale.checkpoint.load import read_tensors
from hopescale.checkpoint.manager import find_checkpoint
from hopescale.checkpoint.manifest import read_manifest
from hopescale.infer.load import load_model
from tests.integration.conftest import Run
from tests.support.layouts import train_run, values
from tests.support.ranks import run_ranks

ATTENTION = ("model.mixer=attention", "model.self_modifying={chunk_size: 64, mu_init: 0.5}")
ARCHITECTURES = {
    "hope": (),
    "hope_attention": (*ATTENTION, "model.attention={num_kv_heads: 2, qk_norm: true}"),
    "transformer": (*ATTENTION, "model.cms.levels.mid=null", "model.cms.levels.slow=null"),
    "hope_bf16": ("train.precision=bf16", "model.self_modifying.projection_chunk_size=16"),
}


def train_all(rank: int, root: Path) -> None:
    """Train each architecture on two stages of two tensor-parallel ranks."""
    for name, overrides in ARCHITECTURES.items():
        train_run(root / name, 4, "parallel.tp=2", "parallel.pp=2", "model.num_layers=2", *overrides, last_step=3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    run_ranks(train_all, 4, root, root)
    return root


@pytest.fixture(scope="module")
def exports(hopescale, runs: Path) -> Path:
    """A folder with the export of each run, verified by the command that wrote it."""
    for name in ARCHITECTURES:
        done = hopescale("convert", "to-hf", runs / name, runs / f"{name}-hf", "--shard-size", "40Ki")
        assert done.code == 0, done.err
        assert "held-out text of markov" in done.out and "64 of 64 tokens equal" in done.out
    return runs


READ = """
import sys
sys.modules["hopescale"] = None
import torch
from transformers import AutoModelForCausalLM

root, *names = sys.argv[1:]
torch.set_num_threads(1)
answers = {}
for name in names:
    model = AutoModelForCausalLM.from_pretrained(f"{root}/{name}-hf", trust_remote_code=True).eval()
    tokens = torch.load(f"{root}/tokens.pt")
    with torch.no_grad():
        logits = model(tokens).logits
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, :6] = 0
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    texts = [model.generate(tokens[:2, :13] * mask, use_cache=cached, **options) for cached in (True, False)]
    answers[name] = (logits, *texts)
torch.save(answers, f"{root}/answers.pt")
"""


@pytest.fixture(scope="module")
def answers(exports: Path) -> dict[str, tuple[Tensor, ...]]:
    """Logits and generated texts of every export, from an interpreter without hopescale."""
    vocab = 26
    torch.save(torch.randint(vocab, (2, 50), generator=torch.Generator().manual_seed(0)), exports / "tokens.pt")
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", READ, str(exports), *ARCHITECTURES]
    done = subprocess.run(command, cwd=exports, env=environ, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    return torch.load(exports / "answers.pt")


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_logits_without_hopescale_are_ours(exports: Path, answers, name: str):
    loaded = load_model(exports / name, torch.device("cpu"))
    expected = loaded.model(torch.load(exports / "tokens.pt"))[0][..., : loaded.config.model.vocab_size]
    limit = 2e-2 if name.endswith("bf16") else 1e-4
    torch.testing.assert_close(answers[name][0].float(), expected.float(), rtol=0, atol=limit)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generation_by_cache_equals_generation_without(answers, name: str):
    _, by_cache, without = answers[name]
    assert by_cache.shape == (2, 33) and torch.equal(by_cache, without)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_way_back_keeps_every_bit(hopescale, exports: Path, tmp_path: Path, name: str):
    back = tmp_path / "back"
    done = hopescale("convert", "from-hf", exports / f"{name}-hf", back, "--no-verify")
    assert done.code == 0, done.err
    before, after = find_checkpoint(exports / name), find_checkpoint(back)
    names = [name for name in read_manifest(before).tensors if name.startswith("model.")]
    assert sorted(read_manifest(after).tensors) == sorted(names)
    old, new = read_tensors(before, names), read_tensors(after, names)
    assert [n for n in names if not torch.equal(old[n].view(torch.uint8), new[n].view(torch.uint8))] == []


def test_a_checkpoint_of_weights_alone_trains_on_with_a_new_optimizer(hopescale, exports: Path, tmp_path: Path):
    back = tmp_path / "back"
    assert hopescale("convert", "from-hf", exports / "hope-hf", back).code == 0
    args = ("train", back / "config.yaml", "parallel.tp=1", "parallel.pp=1", "--run-dir", back)
    refused = hopescale(*args)
    assert refused.code == 4 and "holds weights alone" in refused.err and "--reset-optimizer" in refused.err
    done = hopescale(*args, "--reset-optimizer")
    assert done.code == 0, done.err
    assert "at step 3 with a new optimizer" in done.out and "done: step 6 of 6" in done.out


LAYOUTS = {"hope": "parallel.tp=2", "transformer": "parallel.pp=2"}


def train_on_two(rank: int, root: Path, backs: Path) -> None:
    """Begin a run with weights that come from an export, each on a layout of its own."""
    for name, layout in LAYOUTS.items():
        overrides = ("model.num_layers=2", *ARCHITECTURES[name])
        train_run(root / name, 2, layout, *overrides, last_step=2, init=backs / name)


def test_weights_from_an_export_fit_other_layouts(hopescale, exports: Path, tmp_path: Path):
    for name in LAYOUTS:
        assert hopescale("convert", "from-hf", exports / f"{name}-hf", tmp_path / name, "--no-verify").code == 0
    run_ranks(train_on_two, 2, tmp_path, tmp_path / "two", tmp_path)
    for name in LAYOUTS:
        alone = tmp_path / "one" / name
        train_run(alone, 1, "model.num_layers=2", *ARCHITECTURES[name], last_step=2, init=tmp_path / name)
        fresh = tmp_path / "fresh" / name
        train_run(fresh, 1, "model.num_layers=2", *ARCHITECTURES[name], last_step=1)
        found, expected = values(tmp_path / "two" / name), values(alone)
        assert found == pytest.approx(expected, rel=1e-5) and len(found) == 2
        assert abs(values(fresh)[1] - expected[1]) > 1e-3 * expected[1]


def test_an_export_that_answers_otherwise_is_told_with_its_first_layer(hopescale, exports: Path, tmp_path: Path):
    folder = shutil.copytree(exports / "hope-hf", tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["hope"]["self_modifying"]["chunk_size"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    done = hopescale("convert", "verify", folder, exports / "hope")
    assert done.code == 4 and "the first layer to differ is blocks.0.mixer" in done.err
    other = hopescale("convert", "verify", exports / "hope-hf", exports / "hope_attention")
    assert other.code == 4 and other.err.count("\n") <= 2


def test_an_export_whose_weights_were_changed_is_not_compared(hopescale, exports: Path, tmp_path: Path):
    for place, said in ((None, "has 500 bytes, the manifest says"), (-5, "has other content than the manifest's")):
        folder = shutil.copytree(exports / "hope-hf", tmp_path / str(place))
        file = sorted(folder.glob("*.safetensors"))[0]
        content = bytearray(file.read_bytes())
        if place is None:
            content = content[:500]
        else:
            content[place] ^= 1
        file.write_bytes(content)
        done = hopescale("convert", "verify", folder, exports / "hope")
        assert (done.code, done.out) == (4, "") and f"{folder} is damaged: {file.name} {said}" in done.err
        assert done.err.count("error") == 1


def test_what_cannot_be_exported_is_refused(hopescale, exports: Path, tmp_path: Path):
    done = hopescale("convert", "to-hf", tmp_path, tmp_path / "out")
    assert done.code == 4 and "holds no checkpoint" in done.err
    done = hopescale("convert", "to-hf", exports / "hope", exports / "hope-hf")
    assert done.code == 4 and "already exists" in done.err
    done = hopescale("convert", "to-hf", exports / "hope", tmp_path / "out", "--shard-size", "none")
    assert done.code == 2 and "--shard-size" in done.err


PRETRAINED = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
}
TRAINING = (
    "data.sources.markov.synthetic={task: markov, num_symbols: 24}",
    "train.steps=20",
    "train.seq_len=32",
    "train.micro_batch_size=4",
    "train.global_batch_tokens=128",
    "train.validation.every=null",
    "train.precision=fp32",
    "optim.lr=1e-2",
    "checkpoint.every=10",
    "log.every=1",
    "log.tensorboard=false",
)


@pytest.fixture(scope="module", params=PRETRAINED)
def pretrained(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a random model of another family."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("pretrained") / request.param
    sizes = {"vocab_size": 26, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **sizes, **PRETRAINED[request.param]))
    model.save_pretrained(folder)
    return folder


def test_a_stacked_model_trains_with_its_cadences(hopescale, pretrained: Path, tmp_path: Path):
    stacked, run = tmp_path / "stacked", Run(tmp_path / "run")
    levels = ("--as", "hope-attention", "--levels", "fast=1,slow=4")
    done = hopescale("convert", "from-hf", pretrained, stacked, *levels)
    assert done.code == 0 and "64 of 64 tokens equal" in done.out, done.err
    train = ("train", stacked / "config.yaml", *TRAINING, "--init", stacked, "--run-dir", run.path)
    done = hopescale(*train, "--stop-at", 10)
    assert done.code == 0 and "weights from" in done.out, done.err
    done = hopescale(*train)
    assert done.code == 0 and "at step 10" in done.out and "weights from" not in done.out
    records = [record for record in run.values() if "loss" in record]
    assert [record["step"] for record in records if "level/slow/updates" in record] == [4, 8, 12, 16, 20]
    losses = [record["loss"] for record in records]
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.1
    before, after = read_tensors_of(stacked), run.tensors(20)
    moved = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert {name for name in before if ".cms." in name} <= {*moved}
    assert hopescale("convert", "to-hf", run.path, tmp_path / "hf").code == 0


def read_tensors_of(run: Path) -> dict[str, Tensor]:
    checkpoint = find_checkpoint(run)
    return read_tensors(checkpoint, list(read_manifest(checkpoint).tensors))


def test_weights_of_another_model_do_not_begin_a_run(hopescale, runs: Path, tmp_path: Path):
    config = runs / "hope" / "config.yaml"
    args = ("train", config, "parallel.tp=1", "parallel.pp=1", "--run-dir", tmp_path / "run")
    done = hopescale(*args, "--init", runs / "transformer")
    assert done.code == 2 and "model.mixer: is self_modifying, but attention in" in done.err
    done = hopescale(*args, "--init", runs / "hope", "train.precision=bf16")
    assert done.code == 4 and "train.precision" in done.err
    done = hopescale(*args, "--init", runs / "hope", "train.steps=2", "model.cms.levels.slow.update_every_steps=2")
    assert done.code == 0 and "which is at step 3" in done.out
    done = hopescale(*args, "--init", runs / "hope", "--resume", runs / "hope")
    assert done.code == 2 and "--init has no effect with --resume" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--as", "mamba"), "--as is mamba"),
        (("--as", "hope-attention"), "needs --levels"),
        (("--as", "hope-attention", "--levels", "fast"), "--levels"),
        (("--as", "hope-attention", "--levels", "fast=1,fast=4"), "names fast more than once"),
        (("--as", "hope-attention", "--levels", "fast=1", "--stacking", "deep"), "--stacking is deep"),
        (("--as", "transformer", "--levels", "fast=1"), "no effect with --as transformer"),
        (("--levels", "fast=1"), "no effect without --as"),
        (("--precision", "bf16"), "no effect without --as"),
    ],
)
def test_options_of_from_hf_that_do_not_fit(hopescale, tmp_path: Path, options: tuple[str, ...], message: str):
    done = hopescale("convert", "from-hf", tmp_path, tmp_path / "out", *options)
    assert (done.code, done.out) == (2, "") and message in done.err
