from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hopescale.common.errors import ConfigError
from hopescale.config.schema import AttentionConfig, ModelConfig, RunConfig, SelfModifyingConfig, TrainConfig
from hopescale.train.compiler import check_compiler, choose_backends, mixers_with_kernels


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="no-such-compiler"):
        check_compiler(torch.device("cpu"))
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    check_compiler(torch.device("cpu"))


def test_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="triton"):
        check_compiler(torch.device("cuda"))


def make_config(**changes: object) -> RunConfig:
    model = ModelConfig(
        d_model=64, num_heads=1, mixers={"hope": SelfModifyingConfig(memory_dim=changes.pop("hidden", 64))}
    )
    return RunConfig(model=replace(model, **changes.pop("model", {})), train=TrainConfig(**changes))


def test_kernels_need_a_gpu_and_a_head_they_know(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="need an NVIDIA GPU, Ampere or later, the device is cpu"):
        choose_backends(make_config(backend="triton"), torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert mixers_with_kernels(make_config(backend="triton"), torch.device("cpu")) == ["hope"]
    assert mixers_with_kernels(make_config(backend="torch"), torch.device("cpu")) == []
    with pytest.raises(ConfigError, match="heads are 24 wide"):
        choose_backends(make_config(backend="triton", model={"head_dim": 24}), torch.device("cpu"))


def test_cpp_needs_a_cpu():
    with pytest.raises(ConfigError, match="train.backend is cpp, but .* on cuda"):
        choose_backends(make_config(backend="cpp"), torch.device("cuda"))


def test_kernels_need_memories_they_know(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match="memories are 48 wide, not 16, 32, 64 or 128"):
        choose_backends(make_config(backend="triton", hidden=48), torch.device("cpu"))


def test_attention_has_no_memories_to_run():
    assert choose_backends(make_config(model={"mixers": {"attention": AttentionConfig()}}), torch.device("cpu")) == {}
