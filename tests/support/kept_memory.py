"""What ranks that share sequences hold of them: what is kept after a forward pass, and the most in a step.

From the command line it prints both for 1, 2 and 4 such ranks, as parts of what one process holds:

    python -m tests.support.kept_memory
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hopescale.config.layout import Layout
from hopescale.data.loader import Batch, Share
from hopescale.engine.schedule import Loop, plain_backward
from hopescale.engine.segments import Segments
from hopescale.models import Model
from hopescale.parallel.mesh import Mesh
from tests.support.models import BASE
from tests.support.ranks import run_ranks


def held(mesh: Mesh, seq_len: int, counts: Sequence[int]) -> list[int]:
    """Return what a rank of those that share sequences holds of two blocks of hope memories beside weights, in bytes.

    First what is kept for the backward pass after a forward pass over one micro batch of two sequences, then the most
    in a step, for some numbers of micro batches.
    """
    tokens = torch.randint(0, 200, (2, seq_len), generator=torch.Generator().manual_seed(1))
    model, pieces = Model(BASE, seed=2, mesh=mesh, recompute="chunks"), Segments(mesh, 1)
    batch = Batch(tokens, tokens.roll(-1, 1), torch.zeros_like(tokens))
    batch = batch.share(Share(mesh.cp_group.rank(), mesh.cp_group.size(), 1))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = pieces.run(model, batch, None, None)
    after = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    kept.clear()
    loss.backward()  # makes the gradients of weights, which later passes add to
    pieces.settle()
    loop = Loop(model, plain_backward, pieces, torch.device("cpu"))
    return [after, *(most(loop, [batch] * count) for count in counts)]


def most(loop: Loop, batches: list[Batch]) -> int:
    """Return the most bytes that torch holds during the passes of a step beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loop.train(batches, lambda total: total, None)
    events = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate(size for _, size in changes))


def write_held(rank: int, folder: Path, seq_len: int, counts: Sequence[int]) -> None:
    """Write what each of four ranks holds if two of them, or four, share sequences; the first, what one holds alone."""
    alone = Mesh.alone()
    found = {1: held(alone, seq_len, counts)} if rank == 0 else {}
    for cp in (2, 4):
        found[cp] = held(Mesh.over_all(Layout(cp=cp, dp=4 // cp)), seq_len, counts)
        parallel_state.destroy_model_parallel()
    (folder / f"held-{rank}.json").write_text(json.dumps(found))


def parts_held(folder: Path, seq_len: int, counts: Sequence[int], *, limit_s: int = 300) -> dict[int, list[float]]:
    """Return the most that one of 1, 2 and 4 ranks holds, in parts of what one holds alone, with one micro batch."""
    run_ranks(write_held, 4, folder, folder, seq_len, counts, limit_s=limit_s)
    first, *others = (json.loads((folder / f"held-{rank}.json").read_text()) for rank in range(4))
    kept, one, *_ = first["1"]
    most_held = {1: first["1"]}
    for cp in (2, 4):
        most_held[cp] = list(map(max, zip(*(rank[str(cp)] for rank in (first, *others)), strict=True)))
    return {cp: [own / (one if place else kept) for place, own in enumerate(found)] for cp, found in most_held.items()}


def main() -> None:
    """Print a table in Markdown."""
    heads = ("`parallel.cp`", "after the forward pass", "in a step of one micro batch", "of two")
    sys.stdout.write(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n")
    with tempfile.TemporaryDirectory() as folder:
        found = parts_held(Path(folder), 256, (1, 2), limit_s=3600)
    for cp, parts in found.items():
        sys.stdout.write(f"| {' | '.join((str(cp), *(f'{part:.3f}' for part in parts)))} |\n")


if __name__ == "__main__":
    main()
