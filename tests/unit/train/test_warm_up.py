"""Kernels are compiled before a run's optimizer and first step, once for each kind of mixer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hopescale.config.layout import Layout
from hopescale.config.load import load_recipe
from hopescale.config.schema import AttentionConfig, SelfModifyingConfig
from hopescale.models import Model
from hopescale.models.self_modifying import SelfModifying
from hopescale.parallel.mesh import Mesh
from hopescale.train import setup
from hopescale.train.warm_up import compile_kernels
from tests.support.models import BASE


def test_each_mixer_with_kernels_runs_once_forward_and_backward(monkeypatch: pytest.MonkeyPatch):
    mixers = {
        "hope": SelfModifyingConfig(chunk_size=8),
        "attention": AttentionConfig(),
        "short": SelfModifyingConfig(chunk_size=4),
    }
    pattern = ("hope", "attention", "hope", "short")
    config = replace(BASE, mixers=mixers, pattern=pattern, num_layers=4, within_documents=True)
    slices = [Model(config, seed=0, blocks=range(2)), Model(config, seed=0, blocks=range(2, 4))]
    ran: list[str] = []

    def answer(self: SelfModifying, x: Tensor, _: None, documents: object) -> tuple[Tensor, None]:
        assert x.shape == (12, 1, 32) and documents is not None
        y = self.forward_(x)
        if torch.is_grad_enabled():
            y.register_hook(lambda _: ran.append(f"back {self.config.chunk_size}"))
        ran.append(f"{self.config.chunk_size}{'' if torch.is_grad_enabled() else ' alone'}")
        return y, None

    monkeypatch.setattr(SelfModifying, "forward_", lambda self, x: x @ self.in_proj.weight.mT, raising=False)
    monkeypatch.setattr(SelfModifying, "forward", answer)
    compile_kernels(slices, ["hope", "short"], 12)
    assert ran == ["8", "back 8", "8 alone", "4", "back 4", "4 alone"]
    assert all(p.grad is None for model in slices for p in model.parameters())
    compile_kernels(slices, [], 12)
    assert len(ran) == 6 and torch.is_grad_enabled()


def test_kernels_are_compiled_before_the_optimizer_takes_memory(monkeypatch: pytest.MonkeyPatch):
    calls: list[object] = []
    make = setup.OuterOptimizer
    monkeypatch.setattr(setup, "mixers_with_kernels", lambda *_: ["hope"])
    monkeypatch.setattr(setup, "compile_kernels", lambda slices, *given: calls.append((len(slices), *given)))
    monkeypatch.setattr(
        setup, "OuterOptimizer", lambda *given, **more: calls.append("optimizer") or make(*given, **more)
    )
    config = load_recipe("debug").config
    setup.build_state(config, Layout(), Mesh.alone(), torch.device("cpu"))
    assert calls == [(1, ["hope"], config.train.seq_len), "optimizer"]
