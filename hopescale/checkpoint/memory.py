"""Checkpoints in memory: every rank keeps its own part on its node and at another node, for a start after a failure."""

from __future__ import annotations

import json
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

COURSE = "memory"
"""File in `checkpoints/` with the names of the run and its course in memory, and with the folder that they hold for."""
Accept = Callable[[Mapping[str, Tensor], Manifest], str | None]
"""Function that says what of a part does not fit this rank, or None."""

logger = logging.getLogger(__name__)


class MemoryCheckpoints:
    """Saves the parts of all ranks in the memory of their nodes, and finds them after a start. All ranks call.

    A part is what its rank alone needs, so that only as many ranks of the same layout can continue from it. It is
    written to the rank's own node and sent to a rank of another node. Parts of a step count when all ranks have both
    and have summed the digests of all; only then is the step before removed.

    Parts belong to a course of the run, which ends when the run does not go on from them: a node that is away at that
    time keeps them, but no later start finds them. A new object is of the course that `checkpoints` names, and of a
    nameless one before the first `renew` of a run.

    Args:
        config: Settings: how often to save, and the folder in memory.
        checkpoints: Folder `checkpoints` of the run.
        group: Process group of all ranks on the CPU.
        node: Name of this rank's node; None is the host's.
    """

    def __init__(
        self, config: MemoryCheckpointConfig, checkpoints: Path, group: dist.ProcessGroup, *, node: str | None = None
    ):
        self.config, self._checkpoints, self._group = config, checkpoints, group
        self.rank, self.num_ranks = group.rank(), group.size()
        self._control = Control(group)
        self.node = NodeMemory(
            Path(config.folder), *self._control.broadcast_from_rank0(lambda: read_course(checkpoints))
        )
        self._shift = other_node(self._control.gather(node or socket.gethostname()))
        self._last: int | None = None

    def due(self, step: int) -> bool:
        """Say whether the state after `step` steps is to be saved."""
        return step > 0 and step % self.config.every == 0

    def save(self, step: int, tensors: Mapping[str, Tensor], manifest: Manifest) -> None:
        """Save this rank's part, and hold that of another node's rank; return when all ranks have.

        A save that fails later than the first is a warning, and leaves the one before.

        Raises:
            CheckpointError: If the first save fails, for want of room or because the folder is open to others.
        """
        part = Part(tensors, manifest)
        blocks, problem = self._room(step, part.size)
        if self._sum([problem is not None])[0]:
            problem = next(filter(None, self._control.gather(problem)))
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
        for rank, block, digest in zip((self.rank, self._from), blocks, digests, strict=False):
            self.node.commit(PartNote(step, rank, len(block), digest.hex(), tuple(agreed)), self.rank)
        self._sum([0])  # all ranks have noted it
        self.node.remove(but=step)
        self._last = step

    @property
    def _from(self) -> int:
        return (self.rank - self._shift) % self.num_ranks

    def _room(self, step: int, size: int) -> tuple[list[Tensor], str | None]:
        """Reserve room for this rank's part and for the one that comes, or say why there is none."""
        sizes = [size]
        if self._shift:
            own, other = torch.tensor([size]), torch.zeros(1, dtype=torch.int64)
            self._send_on(own, other)
            sizes.append(int(other))
        try:
            ranks = (self.rank, self._from)
            return [self.node.reserve(step, rank, self.rank, n) for rank, n in zip(ranks, sizes, strict=False)], None
        except OSError:
            return [], "no room on a node"
        except CheckpointError as error:
            return [], error.message

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
            f"cannot keep step {step} in {self.node.folder}: {problem} (a part of rank {self.rank} has "
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
            accept: Function that returns the reason why a part does not fit this rank.
            after: Step of the checkpoint on disk; only later ones count.

        Raises:
            CheckpointError: If the run's folder in memory is open to other users.
        """
        own = self._control.all_ranks_or_raise(self.node.notes)
        held = self._control.gather([note for note in own if note.step > after])
        for step, sources in _candidates(held, self.num_ranks):
            blocks, problem = self._open(own, sources)
            if self._is_used(step, problem):
                part, problem = _read(self._fetch(blocks, sources), sources[self.rank][1], accept)
                if self._is_used(step, problem):
                    self._last = step
                    return part
        return None

    def _is_used(self, step: int, problem: str | None) -> bool:
        """Tell whether no rank has a problem with a step, after a warning if one has."""
        problems = [each for each in self._control.gather(problem) if each]
        if problems and self.rank == 0:
            logger.warning("step %d in memory is not used: %s", step, problems[0])
        return not problems

    def _open(
        self, own: Mapping[PartNote, Path], sources: Sequence[tuple[int, PartNote]]
    ) -> tuple[dict[int, Tensor], str | None]:
        """Return the blocks that this rank gives, by the rank whose they are, or why it cannot."""
        try:
            given = [(rank, own[note]) for rank, (source, note) in enumerate(sources) if source == self.rank]
            return {rank: self.node.read(path) for rank, path in given}, None
        except (OSError, RuntimeError) as error:  # torch raises the second for a file that has gone
            return {}, f"a part that rank {self.rank} has noted cannot be read: {error}"

    def _fetch(self, blocks: Mapping[int, Tensor], sources: Sequence[tuple[int, PartNote]]) -> Tensor:
        """Return this rank's part, from another node if need be, and send the parts that other nodes need."""
        source, note = sources[self.rank]
        own = blocks[self.rank] if source == self.rank else torch.empty(note.size, dtype=torch.uint8)
        work = [
            dist.isend(block, group=self._group, group_dst=rank) for rank, block in blocks.items() if rank != self.rank
        ]
        if source != self.rank:
            work.append(dist.irecv(own, group=self._group, group_src=source))
        for each in work:
            each.wait()
        return own

    def clear(self) -> None:
        """Remove the run's parts from this node, those of other ranks too."""
        self.node.remove()
        self._last = None

    def renew(self) -> None:
        """Begin another course of the run, for which nothing in memory counts, here or elsewhere. All ranks call.

        A start that does not continue from memory calls it before its first save, and a run that goes back.

        Raises:
            CheckpointError: If the course cannot be noted.
        """
        self.clear()
        self.node.course = self._control.broadcast_from_rank0(lambda: _note_course(self._checkpoints, self.node.run))


def read_course(checkpoints: Path) -> tuple[str, str]:
    """Return the names of a run and of its course in memory; new ones if the folder has none of its own.

    The copy of a folder has those of the other, which count for nothing.
    """
    try:
        noted = json.loads((checkpoints / COURSE).read_text(encoding="utf-8"))
        if noted["folder"] == str(checkpoints.resolve()):
            return noted["run"], noted["course"]
    except (OSError, ValueError, TypeError, KeyError):
        pass
    return uuid4().hex, uuid4().hex


def _note_course(checkpoints: Path, run: str) -> str:
    course = uuid4().hex
    try:
        checkpoints.mkdir(parents=True, exist_ok=True)
        names = {"run": run, "course": course, "folder": str(checkpoints.resolve())}
        replace_text(checkpoints / COURSE, f"{json.dumps(names)}\n")
    except OSError as error:
        raise CheckpointError(f"cannot write {checkpoints / COURSE}: {error.strerror or error}") from error
    return course


def _read(
    block: Tensor, note: PartNote, accept: Accept
) -> tuple[tuple[dict[str, Tensor], Manifest] | None, str | None]:
    """Return a rank's part, and a reason not to use it."""
    if digest_of(block).hex() != note.digest:
        return None, f"rank {note.rank}'s part has changed"
    try:
        part = read_part(block)
    except CheckpointError as error:
        return None, error.message
    return part, accept(*part)


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
