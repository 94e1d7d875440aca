"""The check of a job's nodes before it trains: which of them cannot be trusted, and why."""

from __future__ import annotations

import math
import os
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from hopescale.common.disk import replace_text
from hopescale.common.errors import LaunchError
from hopescale.common.rank_info import RankInfo
from hopescale.common.units import format_bytes, plural
from hopescale.observe.run_status import BAD_NODES
from hopescale.parallel import process
from hopescale.parallel.bandwidth import LinkTimes, measure
from hopescale.parallel.device import choose_device, own_device
from hopescale.parallel.init_distributed import what_runs
from hopescale.parallel.store_exchange import StoreExchange

SLOW = 5.0
"""A node is slow if an exchange takes so many times what it takes the median of nodes."""

_MEET_S, _EXCHANGE_S = 120, 60
_FREE_DISK = 2**30
_FREE_DEVICE = 0.8
_WRITTEN = 2**20
_SIZES = {"cuda": 1024, "cpu": 256}


@dataclass
class Verdict:
    """Outcome of a check of nodes.

    Attributes:
        bad: Faulty nodes, with the fault of each.
        shared: Faults of all nodes alike, or of no node in particular.
        summary: Measurements, in words.
    """

    bad: dict[str, str] = field(default_factory=dict)
    shared: list[str] = field(default_factory=list)
    summary: str = ""


def check_nodes(
    rank_info: RankInfo | None,
    node: str,
    nodes: Sequence[str],
    device: str,
    folders: Sequence[Path],
    facts: Mapping[str, str],
) -> Verdict:
    """Check devices, disks and links of all nodes. Called by every rank; all return the same.

    Args:
        rank_info: Rank of this process; None is the only one.
        node: Name of its node.
        nodes: Names of all nodes of the job.
        device: Device of the run: `auto`, `cpu` or `cuda`.
        folders: Folders that every node must be able to write to.
        facts: Values by name that must be the same on all ranks.

    Raises:
        LaunchError: If the ranks do not meet at rank 0, or were started for different things.
    """
    if rank_info is None:
        return judge_faults({0: node}, {0: list(_faults(device, None, folders, True))}, nodes)
    store = process.open_store(rank_info, timedelta(seconds=_MEET_S), wait=False)
    exchange = StoreExchange(store, rank_info.rank, rank_info.world_size, _MEET_S)
    exchange.compare(what_runs(rank_info, facts))
    names = exchange.gather(node)
    ranks_here = [rank for rank, name in names.items() if name == node]
    alone, first = len(ranks_here) == 1, rank_info.rank == min(ranks_here, default=rank_info.rank)
    found = exchange.gather(list(_faults(device, None if alone else rank_info, folders if first else (), alone)))
    verdict = judge_faults(names, found, nodes)
    if not verdict.bad and not verdict.shared:
        links = _measure(rank_info, device, [names[rank] for rank in sorted(names)], store, exchange)
        verdict = judge_links(names, {rank: LinkTimes(**of_rank) for rank, of_rank in exchange.gather(links).items()})
    exchange.leave()
    process.stop()
    return verdict


def exclude(run_dir: Path, nodes: Sequence[str]) -> None:
    """Add nodes to those that a run does not start on again.

    Raises:
        LaunchError: If they cannot be written down.
    """
    path = run_dir / BAD_NODES
    try:
        known = path.read_text().split() if path.exists() else []
        replace_text(path, "".join(f"{node}\n" for node in dict.fromkeys([*known, *nodes])))
    except OSError as error:
        message = f"bad nodes ({', '.join(nodes)}) cannot be written to {path}: {error.strerror}"
        raise LaunchError(message, "leave them out by hand: sbatch --exclude") from error


def judge_faults(names: Mapping[int, str], faults: Mapping[int, Sequence[str]], nodes: Sequence[str]) -> Verdict:
    """Find the nodes at fault by the findings of their ranks, or by their silence.

    `names` has the node of each rank that was there at first, `faults` the reports of those still there afterwards.
    """
    bad: dict[str, list[str]] = {}
    per_node = [list(names.values()).count(node) for node in nodes]
    for node, count in zip(nodes, per_node, strict=True):
        if count < max(per_node):
            bad.setdefault(node, []).append(f"{max(per_node) - count} ranks did not start within {_MEET_S} s")
    for rank, node in names.items():
        if rank not in faults:
            bad.setdefault(node, []).append(f"rank {rank} did not finish its checks within {_MEET_S} s")
        for fault in faults.get(rank, ()):
            bad.setdefault(node, []).append(fault)
    reasons = {node: "; ".join(dict.fromkeys(found)) for node, found in bad.items()}
    return _verdict(reasons, len(nodes), f"{plural(len(nodes), 'node')}, {plural(len(names), 'rank')}")


def judge_links(names: Mapping[int, str], links: Mapping[int, LinkTimes]) -> Verdict:
    """Find the nodes that are slow, or unreachable, while others are not; `links` lacks ranks that have gone."""
    nodes = list(dict.fromkeys(names.values()))
    bad: dict[str, str] = {}
    within: dict[str, float | None] = {}
    best: dict[str, float | None] = {}
    for node in nodes:
        measured = [times for rank, times in links.items() if names[rank] == node]
        within[node] = max((times.within for times in measured if times.within is not None), default=None)
        best[node] = min((seconds for times in measured for seconds in times.pairs.values()), default=None)
    for what, seconds in (("an all-reduce within the node", within), ("an exchange with its neighbours", best)):
        for node, reason in _slow(what, seconds):
            bad.setdefault(node, reason)
    for rank, node in names.items():
        if rank not in links:
            bad.setdefault(node, f"rank {rank} did not finish the exchange")
    bandwidth = [of_rank.bandwidth for of_rank in links.values()]
    text = f"{plural(len(nodes), 'node')}, {plural(len(names), 'rank')}"
    if not bad and None in bandwidth:
        return Verdict({}, ["an all-reduce over all ranks fails or gives wrong sums, on no single node"], text)
    if None not in bandwidth:
        text += f", all-reduce {format_bytes(min(bandwidth))}/s"
    return _verdict(bad, len(nodes), text)


def _slow(what: str, seconds: Mapping[str, float | None]) -> Iterator[tuple[str, str]]:
    """Name the nodes that take much longer than the median; with two nodes, one that fails alone."""
    known = {node: value for node, value in seconds.items() if value is not None}
    if len(known) < 2:
        return
    median = statistics.median_low(known.values())
    for node, value in known.items():
        if math.isinf(value):
            yield node, f"{what} fails"
        elif len(known) > 2 and value > SLOW * median:
            yield node, f"{what} takes {1e3 * value:.3g} ms, the median of nodes is {1e3 * median:.3g} ms"


def _verdict(bad: Mapping[str, str], num_nodes: int, summary: str) -> Verdict:
    """Blame nodes only where there are good ones: a fault on all of them is no node's fault."""
    if bad and len(bad) == num_nodes > 1:
        return Verdict({}, [f"{node}: {reason}" for node, reason in bad.items()], summary)
    return Verdict(dict(bad), [], summary)


def _measure(
    rank_info: RankInfo, device: str, nodes: Sequence[str], store: dist.Store, exchange: StoreExchange
) -> dict[str, object]:
    where = choose_device(device, "train.device")
    if where.type == "cuda":
        where = own_device(rank_info, "train.device")
    with process.failures_raised():
        process.start(rank_info, where, timedelta(seconds=_EXCHANGE_S), store)
        return asdict(measure(nodes, where, lambda: exchange.gather(None)))


def _faults(device: str, rank_info: RankInfo | None, folders: Sequence[Path], alone: bool) -> Iterator[str]:
    """Check the folders and the device of this rank, or all devices of a node that it has `alone`."""
    for folder in folders:
        if (fault := _disk_fault(folder)) is not None:
            yield fault
    try:
        where = choose_device(device, "train.device")
        devices = [where]
        if where.type == "cuda" and alone:
            devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        elif where.type == "cuda":
            devices = [own_device(rank_info, "train.device")]
        for each in devices:
            yield from _device_faults(each)
    except Exception as error:  # a device that is broken may fail in any way
        yield f"{device}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _device_faults(device: torch.device) -> Iterator[str]:
    """Multiply matrices of small whole numbers, whose product every device has to give exactly."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if free < _FREE_DEVICE * total:
            yield f"{device}: {format_bytes(free)} of {format_bytes(total)} free: something else is using it"
    a, b = _whole_numbers(_SIZES[device.type])
    expected = a @ b
    for dtype in (torch.float32, torch.bfloat16):
        found = a.to(device, dtype) @ b.to(device, dtype)
        if not torch.equal(found.cpu(), expected.to(dtype)):
            yield f"{device}: a product of {dtype} matrices is wrong"


def _whole_numbers(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return matrices of -1, 0 and 1, float64, in which no two rows and no two columns are the same.

    All sums of their products stay below 256, so that bfloat16 holds every one, in whatever parts a device adds.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(-1, 2, (2, size, size), generator=generator).double()
    return a, b


def _disk_fault(folder: Path) -> str | None:
    """Write to a folder and read it back; return the fault, if any."""
    path, content = folder / f".check-{os.uname().nodename}-{os.getpid()}", os.urandom(_WRITTEN)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with path.open("w+b") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
                stream.seek(0)
                if stream.read() != content:
                    return f"{folder}: what was written is not what is read"
        finally:
            path.unlink(missing_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"{folder}: {error.strerror}"
    return None if free >= _FREE_DISK else f"{folder}: only {format_bytes(free)} free"
