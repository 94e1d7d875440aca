"""Barriers of the fused self-modifying kernels, in Triton's interpreter, which sees what a program loads and stores."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hopescale.config.schema import SelfModifyingConfig
from tests.gpu.test_self_modifying_triton import INTERPRETED, fused, make_inputs, make_mixer, results
from tests.support.hazards import watched_barriers

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="only the interpreter tells loads and stores")


@pytest.mark.parametrize(
    "changes",
    [
        {"memory": "linear", "adaptive": ("k", "eta", "alpha"), "error_cap": 1.0},
        {"read": "inclusive", "adaptive": ("v", "eta"), "normalize_writes": True},
        {"read": "boundary", "adaptive": ("k",), "momentum": False, "inner_rule": "gd"},
    ],
    ids=["linear", "mlp", "boundary"],
)
def test_a_barrier_parts_what_threads_write_from_what_others_read(changes: dict):
    config = replace(SelfModifyingConfig(chunk_size=8), **changes)
    mixer = make_mixer(config, 1, 16)
    with watched_barriers("self_modifying/triton") as pairs:
        results(fused, mixer, make_inputs(mixer, 19, 1))
    assert not pairs
