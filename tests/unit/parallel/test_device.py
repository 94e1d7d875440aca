"""What a process settles before it uses a GPU."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch

from hopescale.config.layout import Layout
from hopescale.parallel.device import settle_cuda
from hopescale.parallel.init_distributed import init_distributed


def test_what_a_user_has_settled_stays(monkeypatch: pytest.MonkeyPatch):
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS")

    def settled(tp: int, **given: str) -> list[str | None]:
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", given)
            settle_cuda(tp)
            return [given.get(name) for name in names]

    assert settled(1) == ["expandable_segments:True", None, None]
    assert settled(2) == ["expandable_segments:True", None, "1"]
    assert settled(2, PYTORCH_ALLOC_CONF="backend:native", CUDA_DEVICE_MAX_CONNECTIONS="32") == [
        None,
        "backend:native",
        "32",
    ]


@pytest.mark.parametrize("device", ["cuda", "auto", "cpu"])
def test_a_process_settles_it_as_it_takes_a_gpu(device: str, monkeypatch: pytest.MonkeyPatch):
    given: dict[str, str] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", given)
        _, chosen = init_distributed(None, Layout(tp=2), device, "train.device", {}, timeout=timedelta(seconds=1))
    assert chosen.type == ("cpu" if device == "cpu" else "cuda")
    assert set(given) == (set() if device == "cpu" else {"PYTORCH_CUDA_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS"})
