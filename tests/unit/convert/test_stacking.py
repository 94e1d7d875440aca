"""Pre-trained models of transformers as levels: the same function at first, nothing lost, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from hopescale.checkpoint.load import read_tensors
from hopescale.checkpoint.manifest import read_manifest
from hopescale.common.errors import CheckpointError, ConfigError
from hopescale.config.load import from_dict, load_resolved
from hopescale.config.schema import ModelConfig
from hopescale.convert.hf import SafetensorsFolder, export
from hopescale.convert.info import describe
from hopescale.convert.mapping import read_settings, write_settings
from hopescale.convert.stacking import read_source, stack
from hopescale.convert.verify import verify_folder

LEVELS = {"fast": 1, "mid": 2, "slow": 4}
SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SOURCES = {
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": False, "rope_parameters": LLAMA3},
    "mistral": {"num_key_value_heads": 2, "tie_word_embeddings": False, "sliding_window": 9},
    "qwen2": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": {
        "num_key_value_heads": 2,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 900.0, "factor": 2.0},
    },
}


def make_source(folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes) -> Path:
    """Save a random model of a family, away from the zeros and ones it starts with, in two files."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **SOURCES[family], **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder, max_shard_size="90KB")
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    return {family: make_source(root / family, family) for family in SOURCES}


@pytest.mark.parametrize("stacking", ["copy", "depth"])
@pytest.mark.parametrize("family", SOURCES)
def test_a_stacked_model_computes_what_its_source_does(sources, tmp_path: Path, family: str, stacking: str):
    told: list[tuple[str, int, int]] = []
    listen = {"progress": lambda *one: told.append(one)}
    checkpoint = stack(sources[family], tmp_path / "out", LEVELS, stacking, None, **listen)
    verified = verify_folder(sources[family], checkpoint, **listen)
    last = {verb: (done, total) for verb, done, total in told}
    assert list(last) == ["reading", "writing", "comparing"] and all(done == total for done, total in last.values())
    assert verified.difference < 1e-5 and " of 64 tokens equal" in verified.greedy
    config = load_resolved(tmp_path / "out" / "config.yaml")
    assert {name: level.update_every_steps for name, level in config.model.cms.levels.items()} == LEVELS
    names = [name for name in read_manifest(checkpoint).tensors if ".down." in name]
    weights = read_tensors(checkpoint, names)
    per_block = [{name for name in names if f"blocks.{block}." in name} for block in range(4)]
    if stacking == "depth":
        assert [len(block) for block in per_block] == [1] * 4
        assert all(bool(weights[name].any()) for name in names)
    else:
        assert [len(block) for block in per_block] == [3] * 4
        assert all(bool(weights[name].any()) == (".slow." in name) for name in names)


@pytest.mark.parametrize("family", SOURCES)
def test_a_transformer_and_back_keeps_every_bit(sources, tmp_path: Path, family: str):
    checkpoint = stack(sources[family], tmp_path / "out", {"mlp": 1}, "copy", None)
    export(checkpoint, tmp_path / "back", shard_bytes=50_000, native=True)
    before, after = SafetensorsFolder(sources[family]), SafetensorsFolder(tmp_path / "back")
    assert before.keys() == after.keys()
    assert [
        name for name in before if not torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))
    ] == []
    assert not list((tmp_path / "back").glob("*.py"))
    assert verify_folder(tmp_path / "back", checkpoint).difference < 1e-5
    settings = [AutoConfig.from_pretrained(path).to_dict() for path in (sources[family], tmp_path / "back")]
    assert read_settings(settings[0], "before") == read_settings(settings[1], "after")
    scaling, trained = settings[1]["rope_parameters"], load_resolved(tmp_path / "out" / "config.yaml").train.seq_len
    known = scaling["factor"] * scaling["original_max_position_embeddings"] if "low_freq_factor" in scaling else 0
    assert settings[1]["max_position_embeddings"] == max(trained, known)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"num_attention_heads": "four"}, "expected int, got str"), ({"num_attention_heads": 5}, "not a multiple of")],
)
def test_what_transformers_says_of_a_config_is_passed_on(sources, tmp_path: Path, change: dict, said: str):
    folder = shutil.copytree(sources["llama"], tmp_path / "copy")
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(body | change))
    with pytest.raises(CheckpointError, match=f"cannot read .*{said}"):
        read_source(folder)


def test_the_card_of_a_native_export_needs_no_code_of_ours(sources, tmp_path: Path):
    checkpoint = stack(sources["llama"], tmp_path / "run", {"mlp": 1}, "copy", None)
    for native in (True, False):
        export(checkpoint, tmp_path / f"{native}", shard_bytes=90_000, native=native)
        assert ("trust_remote_code" in (tmp_path / f"{native}" / "README.md").read_text()) is not native


def test_a_source_in_bfloat16_stays_so(tmp_path: Path):
    source = make_source(tmp_path / "source", "llama", torch.bfloat16)
    checkpoint = stack(source, tmp_path / "out", LEVELS, "copy", None)
    assert load_resolved(tmp_path / "out" / "config.yaml").train.precision == "bf16"
    assert verify_folder(source, checkpoint).difference < 1e-5


def test_a_lower_precision_is_rounded_to(sources, tmp_path: Path):
    checkpoint = stack(sources["llama"], tmp_path / "out", LEVELS, "copy", "bf16")
    verified = verify_folder(sources["llama"], checkpoint)
    assert 1e-4 < verified.difference < verified.limit == 2e-2


def test_a_wrong_weight_is_told_with_the_first_layer(sources, tmp_path: Path):
    checkpoint = stack(sources["qwen3"], tmp_path / "out", LEVELS, "copy", None)
    other = make_source(tmp_path / "other", "qwen3")
    for file in other.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.layers.2.mlp.up_proj.weight" in tensors:
            tensors["model.layers.2.mlp.up_proj.weight"][0] += 1
        save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"first layer to differ is blocks\.2 \(model\.layers\.2\)"):
        verify_folder(other, checkpoint)


def test_two_tokens_that_are_equally_likely_are_no_error(sources, tmp_path: Path):
    """Each token has a twin, which leads by less than rounding in the folder and not at all in the checkpoint."""
    source = make_source(tmp_path / "source", "llama")
    halves(source, 1.0)
    checkpoint = stack(source, tmp_path / "out", LEVELS, "copy", None)
    halves(source, 1.0 + 1e-6)
    found = re.fullmatch(r"(\d+) of 64 tokens equal, (\d+) where two are .*", verify_folder(source, checkpoint).greedy)
    assert found and int(found[1]) + int(found[2]) == 64 and int(found[2]) > 16


def halves(source: Path, factor: float) -> None:
    """Make the second half of the head that of the first, times a factor."""
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        for head in (tensors[name] for name in tensors.keys() & {"lm_head.weight"}):
            head[50:] = factor * head[:50]
        save_file(tensors, file, {"format": "pt"})


def test_a_wrong_cache_is_told(sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = stack(sources["llama"], tmp_path / "out", LEVELS, "copy", None)
    real = DynamicCache.update

    def spoilt(self, keys: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
        return real(self, keys * (1.5 if keys.shape[2] == 1 else 1.0), *rest)

    monkeypatch.setattr(DynamicCache, "update", spoilt)
    with pytest.raises(CheckpointError, match=r"logits of token \d+ differ by .*, so its cache is not"):
        verify_folder(sources["llama"], checkpoint)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias"),
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type dynamic"),
    ],
)
def test_what_our_attention_lacks_is_refused(family: str, changes: dict, message: str):
    theirs = AutoConfig.for_model(family, **{**SIZES, **SOURCES[family], **changes}).to_dict()
    with pytest.raises(CheckpointError, match=message):
        read_settings(theirs, "it")


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_a_window_of_all_layers_passes_in_both_directions(family: str):
    changes = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
    theirs = AutoConfig.for_model(family, **{**SIZES, **SOURCES[family], **changes}).to_dict()
    ours = read_settings(theirs, "it")
    assert ours["mixers"]["attention"]["window"] == 8
    written = write_settings(as_model(ours), 48)
    again = AutoConfig.for_model(**written).to_dict()
    assert written["model_type"] == family and read_settings(again, "it") == ours


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_window_of_some_layers_is_a_pattern(family: str):
    changes = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    theirs = AutoConfig.for_model(family, **{**SIZES, **SOURCES[family], **changes}).to_dict()
    ours = read_settings(theirs, "it")
    kinds = ["sliding" if kind == "sliding_attention" else "attention" for kind in theirs["layer_types"]]
    assert ours["pattern"] == kinds and set(kinds) == {"attention", "sliding"}
    assert [ours["mixers"][name].get("window") for name in ("attention", "sliding")] == [None, 8]
    written = write_settings(as_model(ours), 48)
    assert written["model_type"] == family
    assert read_settings(AutoConfig.for_model(**written).to_dict(), "it") == ours


def as_model(settings: dict) -> ModelConfig:
    return from_dict({"model": settings}, "it").model


def test_other_families_are_refused(tmp_path: Path):
    AutoConfig.for_model("gpt2", n_layer=1).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(CheckpointError, match="of the family gpt2, not of llama, mistral, qwen2, qwen3"):
        stack(tmp_path / "gpt2", tmp_path / "out", LEVELS, "copy", None)


def test_folders_that_are_not_whole_are_refused(tmp_path: Path):
    source = make_source(tmp_path / "source", "llama")

    def refused(match: str, levels: dict[str, int] = LEVELS, error: type[Exception] = CheckpointError) -> None:
        with pytest.raises(error, match=match):
            stack(source, tmp_path / "out", levels, "copy", None)
        assert not (tmp_path / "out").exists()

    config, index = ((source / name).read_text() for name in ("config.json", "model.safetensors.index.json"))
    with pytest.raises(ConfigError) as caught:
        stack(source, tmp_path / "out", dict.fromkeys("abcde", 1), "depth", None)
    assert "4 blocks, 5 levels" in str(caught.value)
    (source / "config.json").write_text(json.dumps({**json.loads(config), "num_hidden_layers": 5}))
    refused("does not hold model.layers.4.input_layernorm.weight")
    (source / "config.json").write_text(json.dumps({**json.loads(config), "num_hidden_layers": 3}))
    refused("holds model.layers.3.input_layernorm.weight, which hopescale's model has no place for")
    (source / "config.json").write_text(json.dumps({**json.loads(config), "num_key_value_heads": 4}))
    refused(r"k_proj.weight has the shape \[16, 32\], its config asks for \[32\]")
    (source / "config.json").write_text(json.dumps({**json.loads(config), "intermediate_size": 50}))
    refused("not those of its config; different")
    (source / "config.json").write_text(json.dumps({**json.loads(config), "num_hidden_layers": "four"}))
    refused("transformers cannot read .*num_hidden_layers")
    (source / "config.json").write_text(json.dumps({**json.loads(config), "tie_word_embeddings": True}))
    refused(r"ties the embeddings, but lm_head\.weight is not")
    (source / "config.json").write_text(config[:40])
    refused("transformers cannot read")
    (source / "config.json").write_text(config)
    (source / "model.safetensors.index.json").write_text(index[:40])
    refused("model.safetensors.index.json cannot be read")
    (source / "config.json").unlink()
    refused("holds no config.json")


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn])
def test_a_quantised_model_is_described_and_refused(tmp_path: Path, dtype: torch.dtype):
    source = make_source(tmp_path / "source", "llama")
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors.keys() & {"model.layers.2.mlp.up_proj.weight"}:
            tensors[name] = tensors[name].to(dtype)
        save_file(tensors, file, {"format": "pt"})
    assert "tensors" in describe(source)["weights"]
    with pytest.raises(CheckpointError, match=r"is quantised: model\.layers\.2\.mlp\.up_proj\.weight is"):
        stack(source, tmp_path / "out", LEVELS, "copy", None)


def test_info_describes_models_that_state_no_vocabulary(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    rows = describe(tmp_path)
    assert rows["model"].startswith("12 layers") and rows["stacking"].startswith("no: ")


def test_a_comparison_with_what_does_not_fit_is_one_message(sources, save, tmp_path: Path):
    with pytest.raises(CheckpointError, match="has a vocabulary of 100, .* one of 40"):
        verify_folder(sources["llama"], save())
    with pytest.raises(CheckpointError, match="holds no config.json"):
        verify_folder(tmp_path / "nowhere", save())
    export(save(), tmp_path / "export", shard_bytes=50_000)
    (tmp_path / "export" / "modeling_hope.py").write_text("raise TypeError('spoilt')")
    with pytest.raises(CheckpointError, match="transformers cannot load .*spoilt"):
        verify_folder(tmp_path / "export", save())


def test_info_says_what_a_folder_is(sources, save, tmp_path: Path):
    rows = describe(sources["qwen3"])
    assert rows["kind"] == "model of transformers, qwen3" and rows["stacking"].startswith("yes")
    stacked = describe(stack(sources["qwen3"], tmp_path / "out", LEVELS, "depth", None))
    assert stacked["optimizer"] == "none: weights alone" and stacked["data"] == "none yet"
    assert stacked["levels"] == "fast 48 every 1; mid 48 every 2; slow 48 every 4 (over depth, sequential)"
    checkpoint = save("train.steps=9")
    rows = describe(checkpoint.parents[1])
    assert rows["kind"] == f"checkpoint {checkpoint}" and rows["step"] == "7 of 9, 672 tokens seen"
    assert rows["layout"].startswith("saved by 1 rank") and rows["tokenizer"] == "none"
    export(checkpoint, tmp_path / "export", shard_bytes=50_000)
    exported = describe(tmp_path / "export")
    assert exported["kind"].startswith("export for transformers") and exported["weights"] == rows["weights"]
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        describe(tmp_path)
