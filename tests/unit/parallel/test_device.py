"""What a process settles before it uses a GPU."""

from __future__ import annotations

import os

import pytest

from hopescale.parallel.device import settle_cuda


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
