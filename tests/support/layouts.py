"""Trains the same tiny run on any layout, from ranks that have met."""

from __future__ import annotations

import shutil
from collections import Counter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import parallel_state
from torch import Tensor

from hopescale.checkpoint.manifest import folder_name, read_manifest
from hopescale.config.check import check_layout, require_valid
from hopescale.config.layout import Layout, make_layout
from hopescale.config.load import load_recipe
from hopescale.config.schema import RunConfig
from hopescale.observe.metrics import read_metrics
from hopescale.parallel.mesh import Mesh
from hopescale.train.request import RunRequest
from hopescale.train.stop import StopRequest
from hopescale.train.worker import train_on
from tests.support.traffic import StepBytes, counted_steps

TINY = (
    "model.d_model=32",
    "model.num_layers=4",
    "model.num_heads=4",
    "model.mixers.hope={chunk_size: 8, mu_init: 0.6}",
    "model.cms.levels.fast.d_ff=32",
    "model.cms.levels.mid={d_ff: 32, update_every_steps: 2}",
    "model.cms.levels.slow={d_ff: 32, update_every_steps: 4, phase: 1}",
    "train.steps=6",
    "train.seq_len=16",
    "train.micro_batch_size=1",
    "train.global_batch_tokens=64",
    "train.validation={every: 6, tokens: 48}",
    "train.replica_check_every=2",
    "optim.schedule.warmup_steps=2",
    "optim.eps=0.01",
    "checkpoint.every=3",
    "log.every=1",
    "log.trackers=[]",
)
"""Four sequences a step; validation reads three batches, which no number of replicas divides. With its usual `eps`
AdamW moves a weight by the sign of its gradient, even where that is nothing but rounding. With the usual `mu_init` a
bias starts at 0, against which no error is small."""


def train_run(
    folder: Path,
    num_ranks: int,
    *overrides: str,
    last_step: int = 6,
    init: Path | None = None,
    planned: bool = True,
) -> None:
    """Train or continue a run on the ranks that call this; a layout of its own each time.

    Bytes are held to the plan of a run without bad steps, if it is `planned`.
    """
    loaded = require_valid(load_recipe("debug", [*TINY, *overrides]))
    layout = make_layout(loaded.config, num_ranks)
    check_layout(loaded.config, layout, loaded.origins)
    timeout = timedelta(seconds=loaded.config.parallel.first_step_timeout_s)
    mesh = Mesh.alone() if num_ranks == 1 else Mesh.over_all(layout, timeout=timeout)
    try:
        request = RunRequest(loaded, layout, folder, overrides, init=init, stop_at=last_step)
        with counted_steps(mesh) as sent:
            train_on(mesh, torch.device("cpu"), request, StopRequest(), lambda line: None)
        if mesh.control.is_first and planned:
            check_bytes_of_record(folder, loaded.config, layout, sent)
    finally:
        if num_ranks > 1:
            parallel_state.destroy_model_parallel()


def check_bytes_of_record(folder: Path, config: RunConfig, layout: Layout, sent: dict[int, StepBytes]) -> None:
    """Check that the bytes which a run has recorded, from its plan, are those which its first rank sent."""
    first = since = min(sent, default=1)
    for record in read_metrics(folder / "metrics.jsonl"):
        step = record["step"]
        if step not in sent:
            continue
        levels = sent[step].levels if layout.replicas > 1 and config.parallel.stage < 2 else {}
        recorded = {name: value for name, value in record.items() if name.startswith("level/") and "/bytes" in name}
        if step % config.log.every == 0 or step == config.train.steps or recorded:
            expected = {f"level/{level}/bytes": count for level, count in levels.items()}
            assert recorded == expected, f"step {step}: recorded {recorded}, sent {expected}"
        if "tps" not in record:
            continue
        steps, since = range(since, step + 1), step + 1
        if config.parallel.zero == 3 and first in steps:
            continue  # DeepSpeed learns the order of modules, and compares it over all ranks, once in a process.
        total = sum((Counter(sent[number].axes) for number in steps), Counter())
        expected = {f"comm/{axis}/bytes_per_step": count / len(steps) for axis, count in total.items()}
        if layout.num_ranks > 1:
            expected["comm/bytes_per_step"] = total.total() / len(steps)
        recorded = {name: value for name, value in record.items() if name.startswith("comm/")}
        assert recorded == expected, f"steps {steps}: recorded {recorded}, sent {expected}"


def fork(run: Path, other: Path, *, step: int) -> None:
    """Make another run of one as it was when it had saved a step."""
    (other / "checkpoints").mkdir(parents=True)
    shutil.copytree(run / "checkpoints" / folder_name(step), other / "checkpoints" / folder_name(step))
    (other / "checkpoints" / "latest").write_text(f"{folder_name(step)}\n")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (other / "metrics.jsonl").write_text("".join(lines[: step + 1]))


def values(folder: Path, name: str = "loss") -> dict[int, float]:
    """Return a recorded value by step."""
    return {record["step"]: record[name] for record in read_metrics(folder / "metrics.jsonl") if name in record}


def saved(folder: Path, step: int = 6) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint as one process sees them."""
    checkpoint = folder / "checkpoints" / folder_name(step)
    entries = read_manifest(checkpoint).tensors
    tensors = {name: torch.empty(entry.shape, dtype=getattr(torch, entry.dtype)) for name, entry in entries.items()}
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(checkpoint))
    return tensors


def weights(folder: Path, step: int = 6) -> dict[str, Tensor]:
    """Return the model's weights of a checkpoint."""
    return {name: tensor for name, tensor in saved(folder, step).items() if name.startswith("model.")}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest relative error (of norms) of a tensor, and its name."""
    assert found.keys() == expected.keys()
    errors = {
        name: float((found[name].double() - tensor.double()).norm() / (tensor.double().norm() + 1e-12))
        for name, tensor in expected.items()
    }
    name = max(errors, key=errors.get)
    return errors[name], name
