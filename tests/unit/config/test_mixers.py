"""Mixers by name and kind, patterns of blocks, and configs of versions with one mixer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from omegaconf import OmegaConf

from hopescale.common.errors import ConfigError
from hopescale.config.load import from_dict, load_recipe, load_resolved, to_dict, to_yaml
from hopescale.config.model_shape import block_pattern, mixer_counts, mixer_of_block
from hopescale.config.schema import (
    KINDS,
    AttentionConfig,
    MixerConfig,
    ModelConfig,
    RopeScalingConfig,
    RunConfig,
    SelfModifyingConfig,
)

HYBRID = {"hope": SelfModifyingConfig(chunk_size=8), "local": AttentionConfig(window=16)}


def write(folder: Path, name: str, text: str) -> Path:
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder / f"{name}.yaml"


def test_every_kind_is_known_and_keys_of_one_name_have_one_type():
    assert get_args(get_type_hints(MixerConfig)["kind"]) == tuple(KINDS)
    types: dict[str, object] = {}
    for kind, mixer in KINDS.items():
        hints = get_type_hints(mixer)
        assert mixer().kind == kind and get_args(hints.pop("kind")) == (kind,)
        for key, hint in hints.items():
            assert types.setdefault(key, hint) == hint, key


def test_a_pattern_is_repeated_over_the_blocks():
    model = ModelConfig(num_layers=5, mixers=HYBRID, pattern=("hope", "local", "local"))
    assert block_pattern(model) == ("hope", "local", "local", "hope", "local")
    assert mixer_of_block(model, 3) is HYBRID["hope"] and mixer_of_block(model, 4) is HYBRID["local"]
    assert mixer_counts(model) == [(HYBRID["hope"], 2), (HYBRID["local"], 3)]
    assert block_pattern(ModelConfig(num_layers=2)) == ("hope", "hope")


def test_files_and_overrides_add_mixers_and_their_keys(tmp_path: Path):
    write(tmp_path, "base", "model: {mixers: {hope: {kind: self_modifying, chunk_size: 16}}}")
    text = "base: base.yaml\nname: x\nmodel: {mixers: {hope: {momentum: false}, local: {kind: attention, window: 9}}}"
    loaded = load_recipe(write(tmp_path, "x", text), ["model.mixers.local.window=7", "model.pattern=[hope, local]"])
    expected = {"hope": SelfModifyingConfig(chunk_size=16, momentum=False), "local": AttentionConfig(window=7)}
    assert loaded.config.model.mixers == expected and loaded.config.model.pattern == ("hope", "local")
    assert loaded.origins["model.mixers.local.window"] == "command line"
    assert loaded.origins["model.mixers.hope.chunk_size"].endswith("base.yaml")
    assert loaded.origins["model.mixers.hope.memory"] == "default"


def test_a_mixer_of_another_kind_starts_anew(tmp_path: Path):
    recipe = write(tmp_path, "x", "name: x\nmodel: {mixers: {a: {kind: self_modifying, chunk_size: 16}}}")
    loaded = load_recipe(recipe, ["model.mixers.a.kind=attention", "model.mixers.a.qk_norm=true"])
    assert loaded.config.model.mixers == {"a": AttentionConfig(qk_norm=True)}
    again = load_recipe(recipe, ["model.mixers.a=null", "model.mixers.a={kind: attention}"])
    assert again.config.model.mixers == {"a": AttentionConfig()}
    assert load_recipe(recipe, ["model.mixers.a=null"]).config.model.mixers == {}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.mixers.a.window=4", "model.mixers.a.window: no key of kind self_modifying .*a key of attention"),
        ("model.mixers.a.windw=4", "model.mixers.a.windw: unknown key.*did you mean model.mixers.a.window"),
        ("model.mixers.a.kind=mamba", "model.mixers.a.kind: expected one of self_modifying, attention"),
        ("model.chunk_size=4", "did you mean model.mixers.NAME.chunk_size"),
        ("model.mixer=attention", "model.mixer: unknown key.*did you mean model.mixers"),
        ("model.self_modifying.chunk_size=4", "unknown key.*did you mean model.mixers.NAME.chunk_size"),
    ],
)
def test_keys_that_a_kind_lacks_are_named(tmp_path: Path, override: str, message: str):
    recipe = write(tmp_path, "x", "name: x\nmodel: {mixers: {a: {kind: self_modifying}}}")
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_recipe(recipe, [override])


def test_a_resolved_config_is_read_back(tmp_path: Path):
    local = AttentionConfig(window=16, rope_scaling=RopeScalingConfig(first_context=8))
    config = RunConfig(model=ModelConfig(mixers=HYBRID | {"local": local}, pattern=("hope", "local")))
    path = write(tmp_path, "config", to_yaml(config))
    assert load_resolved(path) == config == load_recipe(path).config == from_dict(to_dict(config), "it")


@pytest.mark.parametrize("kind", ["self_modifying", "attention"])
def test_configs_with_one_mixer_are_read(tmp_path: Path, kind: str):
    """As manifests of version 0.1 hold them: both sections, and the name of the one that counts."""
    tree = to_dict(RunConfig())
    del tree["model"]["mixers"], tree["model"]["pattern"], tree["model"]["within_documents"]
    tree["model"] |= {"mixer": kind, "self_modifying": {"chunk_size": 8, "momentum": False}}
    tree["model"]["attention"] = {"num_kv_heads": 2, "within_documents": True}
    model = from_dict(tree, "it").model
    if kind == "attention":
        assert model.mixers == {"attention": AttentionConfig(num_kv_heads=2)} and model.within_documents
    else:
        assert model.mixers == {"hope": SelfModifyingConfig(chunk_size=8, momentum=False, normalize_writes=False)}
        assert not model.within_documents
    assert model.pattern == ()
    path = write(tmp_path, "config", OmegaConf.to_yaml(tree))
    assert load_recipe(path).config.model == load_resolved(path).model == model


def test_runs_of_before_go_on_with_writes_as_printed():
    """Configs of runs hold every value; one without `normalize_writes` is older than the key."""
    now = RunConfig(model=ModelConfig(mixers=HYBRID))
    tree = to_dict(now)
    memories = [mixer for mixer in tree["model"]["mixers"].values() if mixer["kind"] == "self_modifying"]
    for mixer in memories:
        del mixer["normalize_writes"]
    before = from_dict(tree, "it").model.mixers
    assert len(memories) == 1 and before["hope"] == replace(now.model.mixers["hope"], normalize_writes=False)
