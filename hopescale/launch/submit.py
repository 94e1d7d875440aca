"""From a checked recipe to jobs in the queue: what is refused first, what the run folder gets, how it is submitted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory

from hopescale.checkpoint.manifest import incomplete_because, read_manifest, read_pointer
from hopescale.common.disk import replace_text
from hopescale.common.errors import ConfigError, LaunchError, Problem
from hopescale.common.software import describe_software
from hopescale.common.units import format_bytes
from hopescale.config.check import check_layout
from hopescale.config.layout import Layout
from hopescale.config.load import LoadedConfig, from_dict, load_resolved
from hopescale.config.record import CONFIG, write_record
from hopescale.config.show import identity_problems
from hopescale.cost.auto_batch import choose_micro_batch, keeps, planned_bytes, with_micro_batch
from hopescale.cost.hardware import DEVICES
from hopescale.data.sources import open_sources
from hopescale.launch.ledger import LedgerEntry, entries, forget_outcome, note, now, require_not_submitting
from hopescale.launch.profile import seconds_of
from hopescale.launch.sbatch import BatchJob, render
from hopescale.launch.scheduler import Slurm
from hopescale.launch.snapshot import take_snapshot
from hopescale.observe.run_folder import require_own
from hopescale.observe.run_status import is_locked

SCRIPT = "submit.sbatch"


def check_job(job: BatchJob, loaded: LoadedConfig, slurm: Slurm, *, held: bool = False) -> None:
    """Refuse a job that could not train a recipe, as far as that can be seen from here. Writes nothing.

    What Slurm cannot answer about partitions and earlier jobs is not checked.

    Args:
        job: Job of the run.
        loaded: Recipe.
        slurm: Slurm.
        held: Whether this process is the one that submits the folder, by `submitting`.

    Raises:
        ConfigError: If the cluster has no such partition, nodes or GPUs, the time is too short, or the folder holds
            another run.
        LaunchError: If the run folder is in use, cannot be written, or holds files of somebody else's.
    """
    check_cluster(job, slurm)
    if not held:
        require_not_submitting(job.run_dir)
    _check_folder(job.run_dir)
    for entry in entries(job.run_dir):
        if slurm.job(id := entry.job).live:
            hint = f"wait for it, end it with `hopescale jobs cancel {job.run_dir}`, or choose another --run-dir"
            raise LaunchError(f"run folder {job.run_dir} is in use by job {id}, {slurm.job(id).state.lower()}", hint)
    if (job.run_dir / "checkpoints" / "latest").exists() and (job.run_dir / CONFIG).exists():
        before = load_resolved(job.run_dir / CONFIG)
        if problems := identity_problems(before, loaded.config):
            raise ConfigError(problems)


def check_cluster(job: BatchJob, slurm: Slurm) -> None:
    """Refuse a job that the cluster would refuse, or let wait for ever.

    Raises:
        ConfigError: If the cluster has no such partition, nodes or GPUs, or the time is too short or too long.
    """
    if problems := [*_time_problems(job), *_cluster_problems(job, slurm)]:
        raise ConfigError(problems)


def check_inputs(job: BatchJob, loaded: LoadedConfig, layout: Layout, *, open_data: bool = True) -> str | None:
    """Refuse a run whose data is not there, or that by its plan exceeds the memory of the profile's GPUs.

    Args:
        job: Job of the run; paths of data are relative to this process's folder, which is its own.
        loaded: Recipe.
        layout: Degrees of parallelism.
        open_data: Whether data is opened, which only nodes may see.

    Returns:
        A sentence about a micro batch that the start on the nodes chooses, where it is `auto`.

    Raises:
        ConfigError: If the data does not fit the model, or a step does not fit a GPU of the profile's `gpu_type`.
        DataError: If data is missing or damaged.
    """
    config, kind = loaded.config, (job.profile.gpu_type or "").upper()
    if open_data:
        data = replace(config.data, staged=None, cache=None)  # both are folders of the node
        open_sources(data, seq_len=config.train.seq_len, vocab_size=config.model.vocab_size)
    if config.train.micro_batch_size == "auto":
        return _expected_micro_batch(job, loaded, layout, kind)
    if kind in DEVICES and (need := planned_bytes(config, layout, kind)) > (have := DEVICES[kind].memory):
        message = f"a step takes {format_bytes(need)} by its plan, but one {kind} has {format_bytes(have)}"
        hint = f"see `hopescale plan {config.name} --gpus {layout.num_ranks} --device {kind}` for a change that fits"
        raise ConfigError([Problem("gpu_type", message, f"profile {job.profile.name}", hint)])
    return None


def _expected_micro_batch(job: BatchJob, loaded: LoadedConfig, layout: Layout, kind: str) -> str:
    """Say which micro batch a start on the profile's GPUs will choose, or keep; it is checked on the layout.

    Raises:
        ConfigError: If a step fits such a GPU with no micro batch.
    """
    config = loaded.config
    if kind not in DEVICES:
        what = f"no memory is known of gpu_type {job.profile.gpu_type}" if kind else "the profile names no gpu_type"
        return (
            f"train.micro_batch_size: auto is chosen on the nodes; {what}, so that it is not checked that a step fits"
        )
    memory, was = DEVICES[kind].memory, _micro_batch_before(job.run_dir / "checkpoints")
    if was is not None and keeps(was, config, layout, kind, memory):
        return f"train.micro_batch_size: {was} is expected on {kind}, as before; the start decides"
    size = choose_micro_batch(config, layout, kind, memory).size
    check_layout(with_micro_batch(config, size), layout, loaded.origins)
    return f"train.micro_batch_size: {size} is expected on {kind}; the start decides"


def _micro_batch_before(checkpoints: Path) -> int | None:
    """Return the micro batch of a run that has a checkpoint; None for others."""
    pointed = read_pointer(checkpoints)
    if pointed is None or incomplete_because(pointed) is not None:
        return None
    size = from_dict(read_manifest(pointed).config, str(pointed)).train.micro_batch_size
    return None if size == "auto" else size


def write_run(job: BatchJob, loaded: LoadedConfig, layout: Layout, overrides: Sequence[str]) -> Path:
    """Write what the job needs into its run folder, and forget how earlier jobs ended; return the batch script.

    Raises:
        LaunchError: If the folder cannot be written.
    """
    folder, script = job.run_dir, job.run_dir / SCRIPT
    try:
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        forget_outcome(folder)
        write_record(folder, loaded, layout, overrides)
        replace_text(folder / "env.txt", describe_software())
        take_snapshot(folder / "code")
        replace_text(script, render(job))
    except OSError as error:
        hint = "choose another --run-dir"
        raise LaunchError(f"cannot write the run folder {folder}: {error.strerror or error}", hint) from error
    return script


def submit(job: BatchJob, script: Path, slurm: Slurm, *, jobs: int = 1) -> list[str]:
    """Submit a script, once or as a chain in which each job waits for the one before; note the jobs, return their ids.

    Raises:
        LaunchError: If one is refused; those before it stay.
    """
    ids: list[str] = []
    for _ in range(jobs):
        after = [f"--dependency=afterany:{ids[-1]}"] if ids else []
        id = slurm.submit(script, *after)
        ids.append(id)
        log = str(log_of(job, id))
        note(job.run_dir, LedgerEntry(id, now(), job.profile.name, job.nodes, job.ranks, script.name, log))
    return ids


def log_of(job: BatchJob, id: str) -> Path:
    """Return the log of a job."""
    return job.run_dir / "logs" / f"{id}.log"


def expected_start(job: BatchJob, slurm: Slurm) -> str:
    """Return what Slurm says of when a job would start.

    Raises:
        LaunchError: If it would be refused, or Slurm cannot be asked.
    """
    with TemporaryDirectory() as folder:
        script = Path(folder) / SCRIPT
        script.write_text(render(job), encoding="utf-8")
        return slurm.expected_start(script)


def _time_problems(job: BatchJob) -> Iterator[Problem]:
    limit = job.time or job.profile.time
    if limit is None:
        return
    seconds = seconds_of(limit)
    if seconds is None:
        hint = "write minutes, hours:minutes:seconds or days-hours"
        yield Problem("--time", f"{limit!r} is no time limit", hint=hint)
    elif seconds <= job.profile.signal_lead_s:
        lead = job.profile.signal_lead_s
        message = f"{limit} is {seconds} s, but the run is told to stop signal_lead_s={lead} s before its end"
        yield Problem("--time", message, hint="raise the limit, or lower signal_lead_s in the profile")


def _cluster_problems(job: BatchJob, slurm: Slurm) -> Iterator[Problem]:
    partitions, profile = slurm.partitions(), job.profile
    if not partitions:
        return
    known = {partition.name: partition for partition in partitions}
    wanted = (profile.partition or partitions[0].name).split(",")
    if missing := [name for name in wanted if name not in known]:
        hint = f"the cluster has {', '.join(known)}"
        yield Problem("partition", f"{', '.join(missing)} is not on this cluster", f"profile {profile.name}", hint)
        return
    largest = max((known[name] for name in wanted), key=lambda partition: partition.gpus_per_node)
    if profile.gpus_per_node > largest.gpus_per_node:
        message = f"{profile.gpus_per_node}, but nodes of partition {largest.name} have {largest.gpus_per_node}"
        yield Problem("gpus_per_node", message, f"profile {profile.name}")
    largest = max((known[name] for name in wanted), key=lambda partition: partition.nodes)
    if job.nodes > largest.nodes:
        message = f"{job.nodes}, but partition {largest.name} has {largest.nodes}"
        yield Problem("--nodes", message, hint="the job would wait for ever")
    limit, longest = job.time or profile.time, [known[name].max_time for name in wanted]
    seconds, most = seconds_of(limit or ""), max((seconds_of(time) or inf for time in longest), default=inf)
    if seconds is not None and seconds > most:
        message = f"{limit}, but the most that partition {' or '.join(wanted)} allows is {' or '.join(longest)}"
        yield Problem("--time", message, hint="the job would wait for ever")


def _check_folder(folder: Path) -> None:
    """Look whether a run folder can be made or written, and that no process trains in it."""
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        reason = "cannot be written" if nearest.is_dir() else "is a file"
        raise LaunchError(f"run folder {folder}: {nearest} {reason}", "choose another --run-dir")
    require_own(folder, "--run-dir")
    if is_locked(folder):
        hint = "wait for it, stop it, or choose another --run-dir"
        raise LaunchError(f"run folder {folder} is in use by another process", hint)
