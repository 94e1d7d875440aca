from __future__ import annotations

import pytest
import torch

from hopescale.common.errors import ConfigError
from hopescale.train.compiler import check_backend, check_compiler


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


def test_kernels_need_a_gpu_and_a_head_they_know(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="need an NVIDIA GPU, the device is cpu"):
        check_backend("triton", torch.device("cpu"), 64, None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_backend("triton", torch.device("cpu"), 64, None)
    with pytest.raises(ConfigError, match="model.head_dim is 24"):
        check_backend("triton", torch.device("cpu"), 24, None)


def test_cpp_needs_a_cpu():
    with pytest.raises(ConfigError, match="train.backend is cpp, but .* on cuda"):
        check_backend("cpp", torch.device("cuda"), 64, None)


def test_kernels_need_memories_they_know(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match="memories of 16, 32, 64, 128, memory_dim is 48"):
        check_backend("triton", torch.device("cpu"), 64, 48)
