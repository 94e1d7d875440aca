"""Cross-entropy in pieces against torch's over all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hopescale.ops import cross_entropy
from hopescale.ops.cross_entropy import cross_entropy_in_pieces


@pytest.mark.parametrize("piece", [1, 100, 1 << 20])
def test_pieces_sum_to_the_whole(piece: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cross_entropy, "LOGITS_AT_A_TIME", piece)
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(17, 30, generator=generator)).requires_grad_()
    targets = torch.randint(30, (17,), generator=generator)
    targets[::5] = -100
    with torch.no_grad():
        logits[:, 28:] = float("-inf")  # the padding of the vocabulary
        targets[targets >= 28] = 3
    results = []
    for sum_ in (
        cross_entropy_in_pieces(logits, targets, ignored=-100),
        F.cross_entropy(logits, targets, reduction="sum"),
    ):
        results.append((sum_, *torch.autograd.grad(sum_ / 7, logits)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_the_gradient_has_the_type_of_the_logits():
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    cross_entropy_in_pieces(logits, torch.arange(5), ignored=-100).backward()
    exact = torch.softmax(logits.detach().double(), dim=-1) - F.one_hot(torch.arange(5), 11)
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double(), exact, rtol=2**-8, atol=1e-6)
