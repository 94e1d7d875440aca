"""A micro batch through a slice of the model, in pieces: what the model carries goes from each to the next."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hopescale.data.loader import Batch
from hopescale.models import Handover, Model, ModelState
from hopescale.models.recompute import recomputed
from hopescale.parallel.layers import cross_entropy_sum
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.relay import Relay

Probe = dict[str, Tensor]
Mean = Callable[[Tensor], Tensor]


class Segments:
    """Runs this rank's pieces of sequences. Piece `p` of a sequence lies on rank `p mod cp` of those that share it.

    Of every piece but the last on this rank only the states are kept that it begins with: its activations are computed
    again when the backward pass comes to it, and by then those of the piece behind are gone.

    Args:
        mesh: Ranks of the run, and this process among them.
        count: Pieces on each rank.
    """

    def __init__(self, mesh: Mesh, count: int):
        self.mesh, self.count = mesh, count
        self.relay = Relay(mesh, count) if mesh.cp_group.size() > 1 else None

    def run(self, model: Model, batch: Batch, hidden: Tensor | None, probe: Probe | None) -> Tensor:
        """Run forward.

        Args:
            model: Slice of the model.
            batch: This rank's tokens, piece after piece.
            hidden: Output of the slice before `[T, B, N]`; None for the slice that begins the model.
            probe: Dict to be filled with statistics of the memories, of this rank's tokens.

        Returns:
            The cross-entropy in nats, summed over the targets, from the slice that ends the model; `hidden` for the
            next one from others.
        """
        size = batch.tokens.shape[1] // self.count
        within, parts = model.config.within_documents, [batch]
        if self.count > 1 or self.relay is not None:
            parts = batch.pieces(self.count, within_documents=within)
        entering = [None] * self.count if hidden is None else hidden.chunk(self.count)
        state: ModelState | None = None
        outputs, probes = [], []
        for number, (part, begin) in enumerate(zip(parts, entering, strict=True)):
            stats: Probe | None = None if probe is None else {}
            handover = self._handover(number, size, within)
            piece = partial(_piece, model, part, handover)
            if number < self.count - 1:
                output, state = recomputed(piece, begin, state, probe=stats)
            else:
                output, state = piece(begin, state, stats)
            if handover is not None:
                handover.close()
                state = None
            outputs.append(output)
            probes.append(stats)
        if probe is not None:
            probe |= _joined(probes)
        if self.count == 1:
            return outputs[0]
        return torch.stack(outputs).sum() if model.is_last else torch.cat(outputs)

    def settle(self) -> None:
        """Wait until all that was handed on is received. Called by all ranks, after the same passes."""
        if self.relay is not None:
            self.relay.settle()

    def _handover(self, number: int, size: int, within: bool) -> Handover | None:
        if self.relay is None:
            return None
        place, pieces = number * self.relay.size + self.relay.rank, self.count * self.relay.size
        return Handover(self.relay, place * size, size, is_last=place == pieces - 1, within_documents=within)


def _piece(
    model: Model,
    batch: Batch,
    handover: Handover | None,
    hidden: Tensor | None,
    state: ModelState | None,
    probe: Probe | None,
) -> tuple[Tensor, ModelState]:
    """Return what `Segments.run` does, of one piece, and the state behind it."""
    given = {"hidden": hidden, "document_ids": batch.document_ids, "begun": batch.begun, "probe": probe}
    given["handover"] = handover
    output, state = model(batch.tokens, state, **given)
    return cross_entropy_sum(output, batch.targets, model.mesh) if model.is_last else output, state


def _joined(probes: list[Probe]) -> Probe:
    """Join the statistics of pieces of one size: means of means, the largest norm, and the values of all tokens."""
    joined = {"state_norm": lambda values: torch.stack(values).max(), "tokens": torch.cat}
    return {
        name: joined.get(name.rpartition("/")[2], lambda values: torch.stack(values).mean())(
            [probe[name] for probe in probes]
        )
        for name in probes[0]
    }
