"""Steps of all ranks of a layout, one rank after the other in one process; writes what they did as JSON.

python -m tests.support.fake_cuda.step guard.so '[["debug", ["parallel.dp=2"]], ...]'
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.support.fake_cuda import device as fake

if __name__ == "__main__":
    fake.load(Path(sys.argv[1]))

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from triton.runtime.jit import JITFunction, KernelParam

from hopescale.config.layout import smallest_layout
from hopescale.config.load import load_recipe
from hopescale.config.plan import make_plan
from hopescale.config.schema import RunConfig
from hopescale.data.loader import Batch, Data
from hopescale.engine import Engine, make_passes
from hopescale.observe.health import StepLimits
from hopescale.parallel import process
from hopescale.parallel.control import Control
from hopescale.parallel.mesh import Mesh
from hopescale.train.setup import build_state
from tests.support.traffic import SENT

DEVICE = torch.device("cuda", 0)
STEP = 4
"""A step at which all levels are due."""

launches: list[dict[str, Any]] = []
exchanges: list[list[Any]] = []


def _note_launches() -> None:
    """Write down what Triton's kernels are given, instead of running them."""

    def run(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        tensors = [value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor)]
        launches.append(
            {
                "kernel": kernel.fn.__name__,
                "devices": sorted({str(tensor.device) for tensor in tensors}),
                "contiguous": all(tensor.is_contiguous() for tensor in tensors),
                "compiled": _compiled(kernel, arguments, options),
            }
        )

    JITFunction.run = run


def _compiled(kernel: JITFunction, arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    """Return what Triton compiles a kernel for: constants, types, and where a number is 1 or a multiple of 16."""
    names = [parameter.name for parameter in kernel.params]
    given = dict(zip(names, arguments, strict=False)) | options
    found = [_of_argument(parameter, given.pop(parameter.name)) for parameter in kernel.params]
    return repr(found + sorted(given.items()))


def _of_argument(parameter: KernelParam, value: Any) -> Any:
    if parameter.is_constexpr or value is None:
        return value
    if isinstance(value, tuple):
        return [_of_argument(parameter, each) for each in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.storage_offset() * value.element_size() % 16 == 0
    if isinstance(value, float) or parameter.do_not_specialize:
        return type(value).__name__
    return value if value == 1 else value % 16 == 0


def _note_exchanges() -> None:
    """Write down, in order, what is exchanged in which group, with whom, and of which shapes and types."""

    def noted(name: str, method: Any, position: int) -> Any:
        def exchange(group: dist.ProcessGroup, *arguments: Any, **options: Any) -> Any:
            given = arguments[position] if len(arguments) > position else []
            tensors = [given] if isinstance(given, torch.Tensor) else list(given)
            tensors = [each for one in tensors for each in ([one] if isinstance(one, torch.Tensor) else one)]
            ranks = dist.get_process_group_ranks(group)
            peer = ranks[arguments[1]] if name in ("send", "recv") else None
            what = [[list(tensor.shape), str(tensor.dtype), tensor.device.type] for tensor in tensors]
            if len(ranks) > 1:
                exchanges.append([ranks, name, peer, what])
            return method(group, *arguments, **options)

        return exchange

    for name, position in (SENT | {"recv": 0}).items():
        if name in vars(dist.ProcessGroup):
            setattr(dist.ProcessGroup, name, noted(name, getattr(dist.ProcessGroup, name), position))


def exchange_nothing() -> None:
    """Make all groups those of torch's backend that exchanges nothing; ranks decide alone."""
    from deepspeed.runtime.zero import partitioned_param_coordinator  # looks for a GPU as it is imported

    make = dist.new_group

    def new_group(ranks: list[int] | None = None, **options: Any) -> dist.ProcessGroup:
        options = {name: value for name, value in options.items() if name in ("timeout", "group_desc")}
        return make(ranks, backend="fake", **options)

    dist.new_group = new_group
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda _: None
    Control.gather = lambda self, value: [value]
    Control.broadcast_from_rank0 = Control.all_ranks_or_raise = lambda self, function: function()


def _batch(data: Data, indices: range) -> Batch:
    """Read samples as tensors of shapes alone, but for what the host looks at: documents, which are of 21 tokens."""
    with unset_fake_temporarily():
        document_ids = data.batch(indices).document_ids
        document_ids = (torch.arange(document_ids.shape[1]) // 21).int().expand_as(document_ids).contiguous()
    return data.batch(indices)._replace(document_ids=document_ids)


def _know_documents() -> None:
    """Let the host know documents, whole and of pieces of sequences."""
    pieces, numpy = Batch.pieces, torch.Tensor.numpy

    def real_numpy(self: torch.Tensor) -> Any:
        with unset_fake_temporarily():
            return numpy(self)

    def real_pieces(self: Batch, count: int, *, within_documents: bool) -> list[Batch]:
        with unset_fake_temporarily():
            found = pieces(self, count, within_documents=within_documents)
            if not within_documents:
                return found
            return [each._replace(document_ids=each.document_ids.clone(), begun=each.begun.clone()) for each in found]

    Batch.pieces, torch.Tensor.numpy = real_pieces, real_numpy


def _held_by(thing: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Find the tensors of several numbers that an object of ours or of DeepSpeed's holds, through others and lists."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        if thing.numel() > 1:
            yield thing
        return
    if isinstance(thing, dict):
        thing = [*thing.keys(), *thing.values()]
    elif type(thing).__module__.startswith(("hopescale.", "deepspeed.")):
        thing = list(getattr(thing, "__dict__", {}).values())
    for each in thing if isinstance(thing, list | tuple | set) else []:
        yield from _held_by(each, seen)


def _rank(config: RunConfig, rank: int) -> dict[str, Any]:
    """Build one rank, take a step and evaluate."""
    layout = smallest_layout(config)
    launches.clear(), exchanges.clear(), fake.HOST_READS.clear()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.num_ranks)
    mesh = Mesh.over_all(layout, device=DEVICE)
    size = config.train.micro_batch_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        state = build_state(config, layout, mesh, DEVICE)
        how = {"segments": config.train.segments}
        passes = make_passes(state.slices, state.optimizer.backward, config.train.seq_len, DEVICE, **how)
        engine = Engine(passes, state.optimizer, state.levels, DEVICE)
        count = make_plan(config, layout).grad_accumulation
        batches = [_batch(state.data, range(number * size, (number + 1) * size)) for number in range(count)]
        warm = {(each["kernel"], each["compiled"]) for each in launches}
        launches.clear(), exchanges.clear(), fake.HOST_READS.clear()
        engine.update(STEP, engine.gradients(STEP, batches, probe=True), measure=True, limits=StepLimits())
        trained, reads = len(launches), dict(fake.HOST_READS)
        # A validation makes batches for other ranks, whose documents are shapes alone here.
        for name in [] if config.model.within_documents else state.data.validation_sets:
            engine.evaluate(state.data.validation(name, 2 * size * config.train.seq_len, size))
        fake.HOST_READS.clear()
        float(next(iter(state.parameters.values())).sum())
        noticed = sum(fake.HOST_READS.values())
        kept = list(_held_by(state.optimizer, set()))
    process.stop()
    return {
        "weights": sorted({(str(p.device), str(p.dtype)) for p in state.parameters.values()}),
        "held": sorted({tensor.device.type for tensor in kept} - {"meta"}),
        "host_reads": reads,
        "noticed": noticed,
        "compiled_late": sorted({(each["kernel"], each["compiled"]) for each in launches} - warm),
        "launches": launches[:trained],
        "exchanges": list(exchanges),
    }


def main(runs: list[tuple[str, list[str]]]) -> None:
    """Take a step with all ranks of all runs."""
    fake.pretend()
    _note_launches()
    _note_exchanges()
    exchange_nothing()
    _know_documents()
    found = []
    for recipe, overrides in runs:
        config = load_recipe(recipe, overrides).config
        found.append([_rank(config, rank) for rank in range(smallest_layout(config).num_ranks)])
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(sys.argv[2]))
