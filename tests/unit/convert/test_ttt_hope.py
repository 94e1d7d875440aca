"""The test-time training that is shipped in exports against ours: whole, split, and rows at different places."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hopescale.convert.hf_model.columns_hope import Columns, RowPosition
from hopescale.convert.hf_model.ttt_hope import HopeTtt
from hopescale.models.ttt import Ttt
from tests.support.ttt import MODEL, SYSTEMS, make_mixer

ROWS, TOKENS = 3, 37


@pytest.fixture(scope="module", params=SYSTEMS)
def pair(request) -> tuple[Ttt, HopeTtt]:
    config = SYSTEMS[request.param]
    ours = make_mixer(config).float()
    theirs = HopeTtt(SimpleNamespace(**vars(MODEL)), SimpleNamespace(**vars(config)), MODEL.head_dim)
    theirs.load_state_dict(dict(ours.named_parameters()))
    return ours, theirs


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(ROWS, TOKENS, MODEL.d_model, generator=torch.Generator().manual_seed(2))


def columns_of(position: list[int], groups: list[tuple[list[int], slice]]) -> Columns:
    rows = [(torch.tensor(members), span) for members, span in groups]
    return Columns(torch.ones(len(position), 1, dtype=torch.bool), RowPosition(position), rows)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


@torch.no_grad()
def test_a_whole_and_a_split_sequence_equal_ours(pair, x: Tensor):
    ours, theirs = pair
    wanted = ours(x.transpose(0, 1))[0].transpose(0, 1)
    everyone = list(range(ROWS))
    close(theirs(x, {}, columns_of([0] * ROWS, [(everyone, slice(0, TOKENS))]))[0], wanted)
    parts, state, read = [], {}, 0
    for part in x.tensor_split([13, 14, 15, 16], dim=1):
        y, state = theirs(part, state, columns_of([read] * ROWS, [(everyone, slice(0, part.shape[1]))]))
        parts.append(y)
        read += part.shape[1]
    close(torch.cat(parts, dim=1), wanted)


@torch.no_grad()
def test_rows_at_different_places_of_a_mini_batch_go_on_token_by_token(pair, x: Tensor):
    """Rows are padded on the left, and their first tokens are read apart."""
    ours, theirs = pair
    pads, prefill = [0, 3, 9], 17
    groups = [([row], slice(pad, prefill)) for row, pad in enumerate(pads)]
    y, state = theirs(x[:, :prefill], {}, columns_of([0] * ROWS, groups))
    outputs = [y]
    for column in range(prefill, TOKENS):
        one = columns_of([column - pad for pad in pads], [(list(range(ROWS)), slice(0, 1))])
        y, state = theirs(x[:, column : column + 1], state, one)
        outputs.append(y)
    found = torch.cat(outputs, dim=1)
    for row, pad in enumerate(pads):
        close(found[row, pad:], ours(x[row, pad:, None])[0][:, 0])
