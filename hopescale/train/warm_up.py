"""Compiling the memories' kernels before a run's first step, on all ranks at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from hopescale.config.model_shape import block_pattern
from hopescale.models import Model
from hopescale.ops.documents import Documents
from hopescale.parallel.deferred import zeros_lent


def compile_kernels(slices: Sequence[Model], mixers: Iterable[str], seq_len: int) -> None:
    """Run forward, with and without gradients, and backward of one mixer of each name on zeros. Called by all ranks.

    Kernels are compiled when they are first launched, which takes minutes. Within the first step a stage of a pipeline
    would wait until the stage before it has compiled. Here no rank waits, and what the driver reserves for a kernel's
    registers is taken before torch has filled the device. Gradients of parameters stay as they are.

    Args:
        slices: This rank's slices of the model, on their device.
        mixers: Names of the mixers whose memories are run by kernels.
        seq_len: Tokens per sequence.
    """
    left = set(mixers)
    for model in slices:
        pattern, mesh = block_pattern(model.config), model.mesh
        for number, block in model.blocks.items():
            if (name := pattern[int(number)]) in left:
                left.remove(name)
                weight = next(p for p in block.mixer.parameters() if not p.spec.keep_fp32)
                tokens = seq_len // (mesh.tp_group.size() if mesh.sequence_parallel else 1)
                x = weight.new_zeros(tokens, 1, model.config.d_model).requires_grad_()
                within = model.config.within_documents
                documents = Documents.whole(1, seq_len, weight.device) if within else None
                with zeros_lent(block.mixer):
                    y, _ = block.mixer(x, None, documents)
                    torch.autograd.grad(y.sum(), x)
                    with torch.no_grad():
                        block.mixer(x, None, documents)
