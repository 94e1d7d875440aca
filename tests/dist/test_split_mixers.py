"""Test-time training and Titans split over tensor-parallel ranks equal the whole: outputs and every gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hopescale.config.layout import Layout
from hopescale.ops.documents import Documents
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.regions import gather_tokens
from tests.support import titans, ttt
from tests.support.ranks import run_ranks

TOKENS, BATCH = 20, 2
FAMILIES = {"ttt": ttt, "titans": titans}


def check_split(rank: int, family: str, tp: int, sequence_parallel: bool) -> None:
    made = FAMILIES[family]
    mesh = Mesh.over_all(Layout(tp=tp, sequence_parallel=sequence_parallel))
    g = torch.Generator().manual_seed(1)
    x, weights = (torch.randn(TOKENS, BATCH, made.MODEL.d_model, generator=g, dtype=torch.float64) for _ in range(2))
    ids = Documents.of((torch.arange(TOKENS) > 6).long().expand(BATCH, -1))
    for name, config in made.SYSTEMS.items():
        for documents in (None, ids):
            whole, split = made.make_mixer(config), made.make_mixer(config, mesh)
            results = []
            for mixer in (whole, split):
                shared = sequence_parallel and mixer is split
                own, own_weights = (one.chunk(tp)[rank] if shared else one for one in (x, weights))
                own = own.clone().requires_grad_()
                y, _ = mixer(own, documents=documents)
                (y * own_weights).sum().backward()
                results.append((y, own.grad, {key: p.grad for key, p in mixer.named_parameters()}))
            (y, d_x, gradients), (found, found_d_x, found_gradients) = results
            found = gather_tokens(found, mesh) if sequence_parallel else found
            torch.testing.assert_close(found, y, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
            gradients["x"], found_gradients["x"] = d_x, found_d_x
            for key, gradient in gradients.items():
                dim = dict(split.named_parameters())[key].spec.partition_dim if key != "x" else None
                dim = 0 if key == "x" and sequence_parallel else dim
                wanted = gradient if dim is None else gradient.chunk(tp, dim)[rank]
                error = float((found_gradients[key] - wanted).abs().max() / (gradient.abs().max() + 1e-9))
                assert error < 1e-8, f"{name}: gradient of {key} is off by {error:.1e} of its largest entry"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("tp", "sequence_parallel"), [(2, False), (2, True), (4, False)])
def test_split_mixer_equals_whole_mixer(family: str, tp: int, sequence_parallel: bool, tmp_path: Path):
    run_ranks(check_split, tp, tmp_path, family, tp, sequence_parallel)
