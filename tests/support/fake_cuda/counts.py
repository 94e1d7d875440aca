"""Bytes that a block moves and kernels that it launches, in forward and backward, on the CUDA device without memory.

python -m tests.support.fake_cuda.counts guard.so '[["hope_1.3b", ["model.num_heads=32"], 8, 4096], ...]'
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tests.support.fake_cuda import device as fake

if __name__ == "__main__":
    fake.load(Path(sys.argv[1]))

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from hopescale.config.load import load_recipe
from hopescale.models.block import Block
from hopescale.parallel.mesh import Mesh

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product", "_flash_attention", "_efficient_attention")
"""Beginnings of names of operations that are products of matrices, or attention."""
MEMORIES = ("self_modify", "replay")
"""The same of the kernels that run the memories."""
FREE = (
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "slice", "select"),
    *("split", "unbind", "detach", "alias", "as_strided", "split_with_sizes", "unfold", "_reshape_alias"),
    *("new_empty", "empty", "empty_like", "empty_strided", "new_empty_strided", "lift_fresh", "device"),
)
"""Operations that move nothing."""


class Counts(TorchDispatchMode):
    """Counts bytes read and written, and launches, of what is neither a product of matrices nor a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Count an operation of torch."""
        kwargs = kwargs or {}
        result, name = func(*args, **kwargs), func.overloadpacket.__name__
        if name in FREE or name.startswith(PRODUCTS):
            return result
        in_place = name.endswith("_") and not name.startswith("_")
        moved = [*_tensors((args, kwargs)), *_tensors(args[0] if in_place else result)]
        if name in ("zeros_like", "zeros", "new_zeros", "fill_", "zero_", "ones", "full", "ones_like"):
            moved = moved[-1:]
        self.add(name, moved)
        return result

    def add(self, name: str, moved: list[Tensor]) -> None:
        """Add a launch that reads or writes each tensor once."""
        on_device = [tensor for tensor in moved if tensor.device.type == "cuda"]
        if on_device:
            self.bytes[name] += sum(map(_bytes, on_device))
            self.launches[name] += 1


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for each in value for tensor in _tensors(each)] if isinstance(value, list | tuple) else []


def _bytes(tensor: Tensor) -> int:
    """Count the entries of a tensor, those of an expanded one once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


def count_block(recipe: str, overrides: list[str], batch: int, tokens: int) -> dict[str, Any]:
    """Count the first block of a recipe in bf16."""
    model = load_recipe(recipe, overrides).config.model
    counts = Counts()

    def run(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        name = kernel.fn.__name__
        if not name.startswith(MEMORIES):
            # What has no use is given another tensor in its place.
            given = {(t.untyped_storage()._cdata, t.storage_offset()): t for t in _tensors((arguments, options))}
            counts.add(name, list(given.values()))

    JITFunction.run = run
    with FakeTensorMode(allow_non_fake_inputs=True):
        block = Block(model, 0, Mesh.alone()).to("cuda")
        for each in block.parameters():
            if not each.spec.keep_fp32:
                each.data = each.data.to(torch.bfloat16)
        x = torch.empty(tokens, batch, model.d_model, dtype=torch.bfloat16, device="cuda").requires_grad_()
        with counts:
            y, _ = block(x)
            forward = sum(counts.launches.values())
            y.backward(torch.empty_like(y))
    return {
        "bytes": sum(counts.bytes.values()),
        "launches": sum(counts.launches.values()),
        "forward_launches": forward,
        "by_operation": {name: [counts.launches[name], count] for name, count in counts.bytes.most_common(40)},
    }


if __name__ == "__main__":
    fake.pretend()
    sys.stdout.write(json.dumps([count_block(*each) for each in json.loads(sys.argv[2])]))
