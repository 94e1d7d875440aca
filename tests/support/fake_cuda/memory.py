"""The most bytes that tensors take in a training step, on the CUDA device without memory, beside what a plan says.

python -m tests.support.fake_cuda.memory guard.so '[["debug", ["train.precision=bf16"]], ...]'
"""

from __future__ import annotations

import json
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

from tests.support.fake_cuda import device as fake

if __name__ == "__main__":
    fake.load(Path(sys.argv[1]))

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from hopescale.config.layout import smallest_layout
from hopescale.config.load import load_recipe
from hopescale.config.plan import make_plan
from hopescale.config.schema import RunConfig
from hopescale.engine import Engine, make_passes
from hopescale.observe.health import StepLimits
from hopescale.parallel import process
from hopescale.parallel.mesh import Mesh
from hopescale.train.setup import build_state
from tests.support.fake_cuda.step import exchange_nothing

DEVICE = torch.device("cuda", 0)
STEP = 4
"""A step at which all levels are due."""


class Held(TorchDispatchMode):
    """Adds up the bytes of all tensors on the device that are alive, from the one that made each on.

    Attributes:
        most: Most bytes at a time.
        by_operation: Bytes by what made them, at that time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.by_operation: Counter[str] = Counter()
        self._alive: dict[int, tuple[weakref.ref, int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Note what an operation makes."""
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.device.type == "cuda":
                self._note(each.untyped_storage(), func.overloadpacket.__name__)
        return result

    def _note(self, storage: torch.UntypedStorage, name: str) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = weakref.ref(storage, lambda _: self._forget(key)), size, name
        self.now += size
        if self.now > self.most:
            self.most, self.by_operation = self.now, Counter()
            for _, size, name in self._alive.values():
                self.by_operation[name] += size

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)[1]


def most_held(recipe: str, overrides: list[str]) -> list[dict[str, Any]]:
    """Return what each rank of a run holds."""
    config = load_recipe(recipe, overrides).config
    layout, found = smallest_layout(config), []
    for rank in range(layout.num_ranks):
        if layout.num_ranks == 1:
            found.append(_held_by(config, Mesh.alone()))
            continue
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.num_ranks)
        found.append(_held_by(config, Mesh.over_all(layout, device=DEVICE)))
        process.stop()
    return found


def _held_by(config: RunConfig, mesh: Mesh) -> dict[str, Any]:
    """Build a rank and take two steps; return the most bytes at a time, by part of a step."""
    size, held, layout = config.train.micro_batch_size, Held(), smallest_layout(config)
    with FakeTensorMode(allow_non_fake_inputs=True), held:
        state = build_state(config, layout, mesh, DEVICE)
        segments = config.train.segments
        passes = make_passes(state.slices, state.optimizer.backward, config.train.seq_len, DEVICE, segments=segments)
        engine = Engine(passes, state.optimizer, state.levels, DEVICE)
        count = make_plan(config, layout).grad_accumulation
        batches = [state.data.batch(range(number * size, (number + 1) * size)) for number in range(count)]
        found = {}
        for step in (STEP, 2 * STEP):
            held.most = 0
            gradients = engine.gradients(step, batches, probe=True)
            found["backward"] = held.most, held.by_operation.most_common(20)
            held.most = 0
            engine.update(step, gradients, measure=True, limits=StepLimits())
            del gradients
            found["update"] = held.most, held.by_operation.most_common(20)
    return found


if __name__ == "__main__":
    fake.pretend()
    exchange_nothing()
    JITFunction.run = lambda kernel, *arguments, grid, warmup, **options: None
    sys.stdout.write(json.dumps([most_held(*each) for each in json.loads(sys.argv[2])]))
