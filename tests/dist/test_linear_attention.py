"""Linear attention split over tensor-parallel ranks equals the whole: outputs, every gradient, and documents."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hopescale.config.layout import Layout
from hopescale.models.linear_attention import LinearAttention
from hopescale.ops.documents import Documents
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.regions import gather_tokens
from tests.support.linear_attention import MODEL, SYSTEMS, make_mixer
from tests.support.ranks import run_ranks

TOKENS, BATCH = 20, 2


def run(mixer: LinearAttention, x: Tensor, weights: Tensor, ids: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    y, _ = mixer(x, documents=None if ids is None else Documents.of(ids))
    (y * weights).sum().backward()
    return y.detach(), {name: p.grad for name, p in mixer.named_parameters()} | {"x": x.grad}


def check_split(rank: int, tp: int, sequence_parallel: bool) -> None:
    mesh = Mesh.over_all(Layout(tp=tp, sequence_parallel=sequence_parallel))
    g = torch.Generator().manual_seed(1)
    x, weights = (torch.randn(TOKENS, BATCH, MODEL.d_model, generator=g, dtype=torch.float64) for _ in range(2))
    documents = (torch.arange(TOKENS) > 6).long().expand(BATCH, -1)
    for name, config in SYSTEMS.items():
        if (config.key_groups or config.num_heads or MODEL.num_heads) % tp:
            with pytest.raises(ValueError, match="cannot be split evenly"):
                make_mixer(config, mesh)
            continue
        for ids in (None, documents):
            y, gradients = run(make_mixer(config), x.clone().requires_grad_(), weights, ids)
            split = make_mixer(config, mesh)
            parts = (one.chunk(tp)[rank] if sequence_parallel else one for one in (x, weights))
            found, found_gradients = run(split, next(parts).clone().requires_grad_(), next(parts), ids)
            if sequence_parallel:
                found = gather_tokens(found, mesh)
            torch.testing.assert_close(found, y, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
            for key, gradient in gradients.items():
                dim = 0 if key == "x" and sequence_parallel else None
                dim = dict(split.named_parameters())[key].spec.partition_dim if key != "x" else dim
                wanted = gradient if dim is None else gradient.chunk(tp, dim)[rank]
                error = float((found_gradients[key] - wanted).abs().max() / (gradient.abs().max() + 1e-9))
                assert error < 1e-9, f"{name}: gradient of {key} is off by {error:.1e} of its largest entry"


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(2, False), (2, True), (4, False)])
def test_split_mixer_equals_whole_mixer(tp: int, sequence_parallel: bool, tmp_path: Path):
    run_ranks(check_split, tp, tmp_path, tp, sequence_parallel)
