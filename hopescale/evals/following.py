"""The loss on held-out rows while levels follow them."""

from __future__ import annotations

import torch
from torch import Tensor

from hopescale.data.loader import Batch
from hopescale.infer.adaptation import Adaptation
from hopescale.infer.in_context import InContextReader
from hopescale.models import Model
from hopescale.ops.documents import Documents
from hopescale.parallel.layers import IGNORED_TARGET, cross_entropy_sum


def following_loss(model: Model, batch: Batch, adaptation: Adaptation) -> float:
    """Sum the loss in nats over all targets of rows, each read from the trained weights on.

    Where the model mixes within documents alone, levels begin anew with each document: these are read side by side.
    """
    device = next(model.parameters()).device
    rows = batch.tokens, batch.targets
    tokens, targets = rows if not model.config.within_documents else side_by_side(*rows, batch.document_ids)
    total = 0.0
    # Each row has weights of its own: of documents, no more are read at a time than there are rows.
    for own, wanted in zip(*(part.to(device).split(len(batch.tokens)) for part in (tokens, targets)), strict=True):
        place = 0
        for logits in InContextReader(model, adaptation, len(own)).read(own, wanted):
            size = logits.shape[1]
            total += float(cross_entropy_sum(logits, wanted[:, place : place + size], model.mesh))
            place += size
    return total


def side_by_side(tokens: Tensor, targets: Tensor, document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return each document of packed rows `[B, T]` as a row `[documents, longest]`; padding does not count.

    The filling stands behind a document, where nothing that counts sees it.
    """
    documents = Documents.of(document_ids)
    shape = len(documents.lengths), max(documents.lengths)
    apart = tokens.new_zeros(shape), targets.new_full(shape, IGNORED_TARGET)
    present = torch.arange(shape[1]) < torch.tensor(documents.lengths)[:, None]
    for rows, packed in zip(apart, (tokens, targets), strict=True):
        rows[present] = packed.flatten()
    return apart
