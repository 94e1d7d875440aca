"""Sequences of a batch run in groups, by whether documents begin in them: those where none does are laid out alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hopescale.models.state import LayerState
from hopescale.models.statistics import statistics_of
from hopescale.ops.device import to_device
from hopescale.ops.documents import Documents

Run = Callable[[Tensor, LayerState, Documents, dict[str, Tensor] | None], tuple[Tensor, Any]]
"""Maps tokens, a state, documents and a probe to answers, and to the tensors of the next state."""


def run_groups(
    run: Run, x: Tensor, state: LayerState, documents: Documents, probe: dict[str, Tensor] | None
) -> tuple[Tensor, Any]:
    """Run tokens `[T, B, N]` of pieces: apart from the others the rows that hold a part of one document alone."""
    begins = [begin for begin, before in zip(documents.bounds, documents.before, strict=False) if not before]
    with_begins = {begin // len(x) for begin in begins}
    groups = [[row for row in range(x.shape[1]) if (row in with_begins) is one] for one in (True, False)]
    groups = [group for group in groups if group]
    if len(groups) == 1:
        return run(x, state, documents, probe)
    results, probes = [], []
    for rows in groups:
        index, stats = to_device(torch.tensor(rows), x.device), None if probe is None else {}
        tensors = tree_map(lambda part, index=index: None if part is None else part[index], state.tensors)
        results.append(run(x[:, index], state._replace(tensors=tensors), documents.rows(rows), stats))
        probes.append(stats)
    if probe is not None:
        probe |= statistics_of(torch.cat([one["tokens"] for one in probes]), [one["state_norm"] for one in probes])
    order = to_device(torch.tensor([row for rows in groups for row in rows]).argsort(), x.device)
    answers, states = zip(*results, strict=True)
    after = tree_map(lambda *parts: None if parts[0] is None else torch.cat(parts)[order], *states)
    return torch.cat(answers, dim=1)[:, order], after
