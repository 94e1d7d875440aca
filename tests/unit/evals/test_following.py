"""Rows and documents that levels follow, against each read alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hopescale.common.errors import ConfigError
from hopescale.config.schema import AttentionConfig, CmsConfig, LevelConfig, ModelConfig
from hopescale.data.loader import Batch
from hopescale.evals import suites
from hopescale.evals.following import following_loss, side_by_side
from hopescale.evals.request import EvalRequest
from hopescale.infer.adaptation import read_adaptation
from hopescale.infer.in_context import InContextReader
from hopescale.models import Model

LEVELS = CmsConfig(levels={"fast": LevelConfig(d_ff=8), "slow": LevelConfig(d_ff=8, update_every_steps=2)})
SIZES = {"vocab_size": 24, "d_model": 8, "num_layers": 1, "num_heads": 2}
CONFIG = ModelConfig(**SIZES, mixers={"attention": AttentionConfig()}, cms=LEVELS)
CADENCES = read_adaptation("--adapt", "fast=3,slow=7", rate=0.5)


def make_rows(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(24, (rows, length + 1), generator=torch.Generator().manual_seed(length))
    return ids[:, :-1], ids[:, 1:].clone()


def alone(model: Model, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of each token of one text `[T]`."""
    logits = torch.cat(list(InContextReader(model, CADENCES, 1).read(tokens[None], targets[None])), 1)
    return F.cross_entropy(logits[0].float(), targets, reduction="none", ignore_index=-100)


def test_documents_of_packed_rows_are_read_alone():
    model = Model(replace(CONFIG, within_documents=True), seed=1).eval()
    tokens, targets = make_rows(2, 11)
    targets[0, 4] = -100
    ids = torch.tensor([[0] * 5 + [1] * 6, [0] + [1] * 8 + [2] * 2], dtype=torch.int32)
    bounds = [(0, 0, 5), (0, 5, 11), (1, 0, 1), (1, 1, 9), (1, 9, 11)]
    expected = sum(float(alone(model, tokens[row, a:b], targets[row, a:b]).sum()) for row, a, b in bounds)
    assert following_loss(model, Batch(tokens, targets, ids), CADENCES) == pytest.approx(expected, rel=1e-5)
    apart, _ = side_by_side(tokens, targets, ids)
    assert [row[:size].tolist() for row, size in zip(apart, (5, 6, 1, 8, 2), strict=True)] == [
        tokens[row, a:b].tolist() for row, a, b in bounds
    ]


def test_rows_are_judged_while_levels_follow_them():
    model = Model(CONFIG, seed=1).eval()
    tokens, targets = make_rows(2, 17)
    targets[0, 6], targets[1, 8:] = (targets[0, 6] + 1) % 24, -100  # an answer that does not stand in the row
    judged = suites.judge(model, tokens.numpy(), targets.numpy(), CADENCES)
    for row, found in enumerate(judged):
        learned = targets[row].clone()
        learned[:-1][targets[row, :-1] != tokens[row, 1:]] = -100
        learned[-1] = -100
        reader = InContextReader(model, CADENCES, 1)
        logits = torch.cat(list(reader.read(tokens[row : row + 1], learned[None])), 1)[0]
        wanted = F.cross_entropy(logits, targets[row], reduction="none", ignore_index=-100)
        asked = (targets[row] != -100).numpy()
        np.testing.assert_allclose(found.loss[asked], wanted.numpy()[asked], rtol=1e-5)
        assert np.isnan(found.loss[~asked]).all()
    plain = suites.judge(model, tokens.numpy(), targets.numpy())
    zero = suites.judge(model, tokens.numpy(), targets.numpy(), read_adaptation("--adapt", "fast=3", rate=0))
    for before, after, moved in zip(plain, zero, judged, strict=True):
        np.testing.assert_array_equal(before.loss, after.loss)
        assert not np.array_equal(before.loss, moved.loss, equal_nan=True)


def test_tasks_of_single_texts_are_refused():
    with pytest.raises(ConfigError, match=r"--adapt follows streams: perplexity and suites; arc_easy are single texts"):
        EvalRequest.read(["arc_easy", "perplexity"], None, adaptation=CADENCES)
