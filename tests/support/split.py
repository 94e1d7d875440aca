"""Compares a model split over tensor-parallel ranks with the same model in one process."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hopescale.config.schema import (
    AttentionConfig,
    CmsConfig,
    FarMemoryConfig,
    LinearAttentionConfig,
    RopeScalingConfig,
    SelfModifyingConfig,
    TitansConfig,
    TransferConfig,
    TttConfig,
)
from hopescale.models import Model
from hopescale.parallel.layers import IGNORED_TARGET, cross_entropy_sum
from hopescale.parallel.mesh import Mesh
from tests.support.models import BASE, LEVELS

VARIANTS = {
    "hope": {},
    "hope, all switches": {
        "mixers": {
            "hope": SelfModifyingConfig(
                memory="linear",
                query="memory",
                gate=True,
                adaptive=("k", "eta"),
                chunk_size=8,
                projection_chunk_size=16,
            )
        }
    },
    "hybrid, within documents": {
        "mixers": {
            "hope": SelfModifyingConfig(chunk_size=4, reset_every=8, far=FarMemoryConfig(8, 0.1)),
            "local": AttentionConfig(window=5),
        },
        "pattern": ("local", "hope"),
        "within_documents": True,
    },
    "linear attention, within documents": {
        "mixers": {"gdn": LinearAttentionConfig(key_dim=6, chunk_size=8)},
        "within_documents": True,
    },
    "ttt, within documents": {
        "mixers": {"ttt": TttConfig(memory="mlp", chunk_size=4)},
        "within_documents": True,
    },
    "titans, within documents": {
        "mixers": {
            "mac": TitansConfig(persistent_tokens=3, chunk_size=8),
            "mal": TitansConfig(composition="mal", persistent_tokens=3, chunk_size=8, window=7),
        },
        "pattern": ("mac", "mal"),
        "within_documents": True,
    },
    "attention": {"mixers": {"attention": AttentionConfig(qk_norm=True)}, "within_documents": True},
    "sliding window": {"mixers": {"attention": AttentionConfig(window=5)}, "within_documents": True},
    "grouped-query attention": {
        "mixers": {
            "attention": AttentionConfig(num_kv_heads=4, qkv_bias=True, rope_scaling=RopeScalingConfig(first_context=8))
        },
        "num_heads": 8,
    },
    "independent levels": {"cms": CmsConfig("independent", LEVELS)},
    "untied, no padding": {"tie_embeddings": False, "vocab_size": 256},
    "attention, wider than its base": {
        "mixers": {"attention": AttentionConfig()},
        "transfer": TransferConfig(16, base_head_dim=4),
    },
}


class Batch:
    """Random tokens and targets `[B, T]` of two documents, some targets ignored."""

    def __init__(self, tokens: int):
        g = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(0, 200, (2, tokens), generator=g)
        self.targets = torch.randint(0, 200, (2, tokens), generator=g)
        self.targets[:, ::5] = IGNORED_TARGET
        self.document_ids = (torch.arange(tokens) > 6).long().expand(2, -1)

    def run(self, model: Model) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss, this rank's logits and all gradients."""
        logits, _ = model(self.tokens, document_ids=self.document_ids)
        loss = cross_entropy_sum(logits, self.targets, model.mesh)
        loss.backward()
        return loss.detach(), logits.detach(), {name: p.grad for name, p in model.named_parameters()}


def check_split(name: str, mesh: Mesh, batch: Batch, recomputes: tuple[str, ...] = ("none",)) -> None:
    """Hold variant `name`, split over `mesh`, to the whole model: loss, logits and every gradient.

    In float64, all but the cross-entropy: gates' gradients are sums that nearly cancel.
    """
    config = replace(BASE, **VARIANTS[name])
    tp, rank = mesh.tp_group.size(), mesh.tp_group.rank()
    loss, logits, gradients = batch.run(Model(config, seed=2, mesh=Mesh.alone()).double())
    for recompute in recomputes:
        case = f"{name}, recompute {recompute}"
        split = Model(config, seed=2, mesh=mesh, recompute=recompute).double()
        split_loss, split_logits, split_gradients = batch.run(split)
        torch.testing.assert_close(split_loss, loss, rtol=1e-5, atol=0, msg=lambda m, c=case: f"{c}: {m}")
        torch.testing.assert_close(split_logits, logits.chunk(tp, -1)[rank], rtol=1e-4, atol=1e-5)
        for parameter, gradient in gradients.items():
            dim = dict(split.named_parameters())[parameter].spec.partition_dim
            expected = gradient if dim is None else gradient.chunk(tp, dim)[rank]
            scale = float(gradient.abs().max()) + 1e-6
            error = float((split_gradients[parameter] - expected).abs().max()) / scale
            assert error < 1e-5, f"{case}: gradient of {parameter} is off by {error:.1e} of its largest entry"
