"""The linear attention that is shipped in exports against ours: whole, split, and with rows padded on either side."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hopescale.config.schema.linear_attention import LinearAttentionConfig
from hopescale.convert.hf_model.columns_hope import Columns, RowPosition
from hopescale.convert.hf_model.linear_hope import HopeLinearAttention
from hopescale.models.linear_attention import LinearAttention
from tests.support.linear_attention import MODEL, SYSTEMS, make_mixer

TOKENS, CUT = 37, 13
PADS = (0, 5, 16)


@pytest.fixture(scope="module", params=SYSTEMS)
def pair(request) -> tuple[LinearAttention, HopeLinearAttention]:
    config: LinearAttentionConfig = SYSTEMS[request.param]
    ours = make_mixer(config).float()
    theirs = HopeLinearAttention(SimpleNamespace(**vars(MODEL)), SimpleNamespace(**vars(config)), MODEL.head_dim)
    theirs.load_state_dict(dict(ours.named_parameters()))
    return ours, theirs


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(len(PADS), TOKENS, MODEL.d_model, generator=torch.Generator().manual_seed(2))


def columns_of(rows: int, tokens: int, past: int = 0) -> Columns:
    real = torch.ones(rows, past + tokens, dtype=torch.bool)
    return Columns(real, RowPosition([past] * rows), [(torch.arange(rows), slice(0, tokens))])


def padded_columns(*, left: bool) -> Columns:
    spans = [slice(pad, TOKENS) if left else slice(0, TOKENS - pad) for pad in PADS]
    groups = [(torch.tensor([row]), span) for row, span in enumerate(spans)]
    return Columns(torch.ones(len(PADS), TOKENS, dtype=torch.bool), RowPosition([0] * len(PADS)), groups)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@torch.no_grad()
def test_a_whole_and_a_split_sequence_equal_ours(pair, x: Tensor):
    ours, theirs = pair
    wanted, last = ours(x.transpose(0, 1))
    whole, state = theirs(x, {}, columns_of(len(x), TOKENS))
    close(whole, wanted.transpose(0, 1))
    close(state["memory"], last.tensors.memory)
    parts, state, read = [], {}, 0
    for part in x.tensor_split([CUT, CUT + 1, CUT + 2], dim=1):
        y, state = theirs(part, state, columns_of(len(x), part.shape[1], read))
        parts.append(y)
        read += part.shape[1]
    close(torch.cat(parts, dim=1), wanted.transpose(0, 1))


@pytest.mark.parametrize("left", [True, False])
@torch.no_grad()
def test_padded_rows_equal_rows_alone(pair, x: Tensor, left: bool):
    ours, theirs = pair
    columns = padded_columns(left=left)
    y, state = theirs(x, {}, columns)
    for rows, span in columns.groups:
        wanted, last = ours(x[rows, span].transpose(0, 1))
        close(y[rows, span], wanted.transpose(0, 1))
        close(state["memory"][rows], last.tensors.memory)
