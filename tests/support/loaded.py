"""A model as if it had been loaded from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from hopescale.checkpoint.manifest import Manifest
from hopescale.config.load import from_dict, to_dict
from hopescale.config.schema import RunConfig
from hopescale.infer.load import LoadedModel
from hopescale.models import Model

KINDS = {
    "hope": {},
    "linear": {"mixers": {"hope": {"chunk_size": 8, "memory": "linear", "momentum": False, "conv_width": 0}}},
    "hope_attention": {"mixers": {"attention": {"kind": "attention", "num_kv_heads": 1, "qk_norm": True}}},
}


def make_loaded(kind: str = "hope", precision: str = "fp32", seed: int = 3, **model: object) -> LoadedModel:
    """Return a fresh model of 32 tokens, as if loaded from a checkpoint at step `seed`."""
    tree = to_dict(RunConfig())
    levels = {"fast": {"d_ff": 16}, "slow": {"d_ff": 16, "update_every_steps": 2}}
    tree["model"] = {"vocab_size": 32, "d_model": 16, "num_layers": 2, "num_heads": 2, "tie_embeddings": False}
    tree["model"] |= {"mixers": {"hope": {"chunk_size": 8}}, "cms": {"levels": levels}, **KINDS[kind], **model}
    tree["train"]["precision"] = precision
    config = from_dict(tree, "test")
    net = Model(config.model, seed=seed).eval()
    if precision == "bf16":
        net.to_precision(torch.bfloat16)
    return LoadedModel(net, None, config, Manifest({"step": seed}, to_dict(config), {}), Path(f"step-{seed}"))


def make_tokens(length: int, rows: int = 1) -> torch.Tensor:
    """Draw tokens `[rows, length]`."""
    return torch.randint(32, (rows, length), generator=torch.Generator().manual_seed(length))
