"""Checkpoints in memory: every rank keeps its own part on its node and at another node, for a start after a failure."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from hopescale.checkpoint.manifest import Manifest
from hopescale.checkpoint.node_memory import NodeMemory, Part, PartNote, digest_of, read_part
from hopescale.common.disk import replace_text
from hopescale.common.errors import CheckpointError
from hopescale.common.units import format_bytes
from hopescale.config.schema import MemoryCheckpointConfig
from hopescale.parallel.control import Control

RUN_NAME = "memory"
"""File in `checkpoints/` with the name of the run's parts in memory: a run that was deleted has none any more."""
Accept = Callable[[Mapping[str, Tensor], Manifest], str | None]
"""Function that says what of a part does not fit this rank, or None."""

logger = logging.getLogger(__name__)


class MemoryCheckpoints:
    """Saves the parts of all ranks in the memory of their nodes, and finds them after a start. All ranks call.

    A part is what its rank alone needs, so that only as many ranks of the same layout can continue from it. It is
    written to the rank's own node and sent to a rank of another node. Parts of a step count when all ranks have both
    and have summed the digests of all; only then is the step before removed.

    Args:
        config: Settings: how often to save, and the folder in memory.
        run: Name of the run, which `run_name` returns.
        group: Process group of all ranks on the CPU.
        node: Name of this rank's node; None is the host's.
    """

    def __init__(self, config: MemoryCheckpointConfig, run: str, group: dist.ProcessGroup, *, node: str | None = None):
        self.config, self._group = config, group
        self.rank, self.num_ranks = group.rank(), group.size()
        self.node = NodeMemory(Path(config.folder), run)
        self._shift = other_node(Control(group).gather(node or socket.gethostname()))
        self._last: int | None = None

    def due(self, step: int) -> bool:
        """Say whether the state after `step` steps is to be saved."""
        return step > 0 and step % self.config.every == 0

    def save(self, step: int, tensors: Mapping[str, Tensor], manifest: Manifest) -> None:
        """Save this rank's part, and hold that of another node's rank; return when all ranks have.

        A save that fails later than the first is a warning, and leaves the one before.

        Raises:
            CheckpointError: If the first save fails, for want of room.
        """
        part = Part(tensors, manifest)
        blocks = self._room(step, part.size)
        problem = None
        if self._sum([blocks is None])[0]:
            problem = "no room"
        else:
            part.write(blocks[0])
            digests = [digest_of(blocks[0])]
            if self._shift:
                self._send_on(blocks[0], blocks[1])
                digests.append(digest_of(blocks[1]))
            is_torn, *agreed = self._sum([not self._arrived(digests), *_words(digests[0])])
            problem = "a part changed on its way to another node" if is_torn else None
        if problem is not None:
            self.node.remove(but=self._last)
            self._complain(step, problem, part.size)
            return
        for rank, digest in zip((self.rank, self._from), digests, strict=False):
            self.node.commit(PartNote(step, rank, digest.hex(), tuple(agreed)), self.rank)
        self._sum([0])  # all ranks have noted it
        self.node.remove(but=step)
        self._last = step

    @property
    def _from(self) -> int:
        return (self.rank - self._shift) % self.num_ranks

    def _room(self, step: int, size: int) -> list[Tensor] | None:
        """Reserve room for this rank's part and for the one that comes; None if there is none."""
        sizes = [size]
        if self._shift:
            own, other = torch.tensor([size]), torch.zeros(1, dtype=torch.int64)
            self._send_on(own, other)
            sizes.append(int(other))
        try:
            ranks = (self.rank, self._from)
            return [self.node.reserve(step, rank, self.rank, n) for rank, n in zip(ranks, sizes, strict=False)]
        except OSError:
            return None

    def _send_on(self, own: Tensor, other: Tensor) -> None:
        """Send a tensor to the rank at another node, and receive that of the rank for which this is one."""
        to = (self.rank + self._shift) % self.num_ranks
        work = [
            dist.isend(own, group=self._group, group_dst=to),
            dist.irecv(other, group=self._group, group_src=self._from),
        ]
        for each in work:
            each.wait()

    def _arrived(self, digests: Sequence[bytes]) -> bool:
        """Tell whether the part of another rank arrived as it was sent."""
        if not self._shift:
            return True
        sent = torch.empty(32, dtype=torch.uint8)
        self._send_on(torch.frombuffer(bytearray(digests[0]), dtype=torch.uint8), sent)
        return bytes(sent.tolist()) == digests[1]

    def _sum(self, values: Sequence[int]) -> list[int]:
        total = torch.tensor([int(value) for value in values])
        if self.num_ranks > 1:
            dist.all_reduce(total, group=self._group)
        return total.tolist()

    def _complain(self, step: int, problem: str, size: int) -> None:
        message = (
            f"cannot keep step {step} in {self.node.folder}: {problem} on a node (a part of rank {self.rank} has "
            f"{format_bytes(size)}; a node needs four times the parts of its ranks, {format_bytes(self.node.free())} "
            "are free on this one)"
        )
        if self._last is None:
            raise CheckpointError(message, "set checkpoint.memory.every=null, or checkpoint.memory.folder elsewhere")
        if self.rank == 0:
            logger.warning("%s; the one before stays", message)

    def load(self, accept: Accept, *, after: int) -> tuple[dict[str, Tensor], Manifest] | None:
        """Return this rank's part of the newest step that all ranks have whole, and that fits them all.

        Args:
            accept: Function that says what of a part does not fit this rank.
            after: Step of the checkpoint on disk; only later ones count.
        """
        own = self.node.notes()
        held = Control(self._group).gather([note for note in own if note.step > after])
        for step, sources in _candidates(held, self.num_ranks):
            block = self._fetch(own, sources)
            problem = None
            if digest_of(block).hex() != sources[self.rank][1].digest:
                problem = f"rank {self.rank}'s part has changed"
            else:
                part = read_part(block)
                problem = accept(*part)
            problems = [each for each in Control(self._group).gather(problem) if each]
            if not problems:
                self._last = step
                return part
            if self.rank == 0:
                logger.warning("step %d in memory is not used: %s", step, problems[0])
        return None

    def _fetch(self, own: Mapping[PartNote, Path], sources: Sequence[tuple[int, PartNote]]) -> Tensor:
        """Return this rank's part, from another node if it is not on this one, and send what others need of here."""
        block, work = torch.zeros(0, dtype=torch.uint8), []
        for rank, (source, note) in enumerate(sources):
            if source == rank == self.rank:
                block = self.node.read(own[note])
            elif source == self.rank:
                sent = self.node.read(own[note])
                dist.send(torch.tensor([len(sent)]), group=self._group, group_dst=rank)
                work.append((dist.isend(sent, group=self._group, group_dst=rank), sent))
            elif rank == self.rank:
                size = torch.zeros(1, dtype=torch.int64)
                dist.recv(size, group=self._group, group_src=source)
                block = torch.empty(int(size), dtype=torch.uint8)
                work.append((dist.irecv(block, group=self._group, group_src=source), block))
        for each, _ in work:
            each.wait()
        return block

    def clear(self) -> None:
        """Remove the run's parts from this node, whoever wrote them."""
        self.node.remove()
        self._last = None


def run_name(checkpoints: Path) -> str:
    """Return the name of a run's parts in memory, and make one if there is none. Called by one process."""
    path = checkpoints / RUN_NAME
    if not path.exists():
        checkpoints.mkdir(parents=True, exist_ok=True)
        replace_text(path, f"{uuid4().hex}\n")
    return path.read_text(encoding="utf-8").strip()


def other_node(nodes: Sequence[str]) -> int:
    """Return by how much a rank's number grows to that of the rank at another node which holds its part.

    It is the least for which this is so for most ranks; 0 if there is one node.
    """
    count = len(nodes)
    apart = {shift: sum(nodes[i] != nodes[(i + shift) % count] for i in range(count)) for shift in range(count)}
    return max(apart, key=lambda shift: (apart[shift], -shift))


def _candidates(held: Sequence[Sequence[PartNote]], num_ranks: int) -> Iterator[tuple[int, list[tuple[int, PartNote]]]]:
    """Yield the steps, newest first, of which every rank's part is somewhere: for each rank who has it, and its note.

    A rank's own node comes first, then the lowest rank.
    """
    found: dict[tuple[int, tuple[int, ...]], dict[int, dict[int, PartNote]]] = {}
    for source, notes in enumerate(held):
        for note in notes:
            found.setdefault((note.step, note.agreed), {}).setdefault(note.rank, {})[source] = note
    for (step, _), parts in sorted(found.items(), reverse=True):
        if parts.keys() == set(range(num_ranks)):
            sources = [rank if rank in parts[rank] else min(parts[rank]) for rank in range(num_ranks)]
            yield step, [(source, parts[rank][source]) for rank, source in enumerate(sources)]


def _words(digest: bytes) -> list[int]:
    """Return a digest as numbers whose sum over a million ranks is no overflow."""
    return [int.from_bytes(digest[i : i + 4], "little") for i in range(0, len(digest), 4)]
