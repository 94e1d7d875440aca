"""AdamW against torch's, and against its equation entry by entry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hopescale.optim.adamw import AdamW
from hopescale.optim.gate import StepGate


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_torch_adamw_with_its_state_from_the_start():
    ours, theirs = ([nn.Parameter(randn(3, 4, seed=0).float()), nn.Parameter(randn(5, seed=1).float())] for _ in "ab")
    settings = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    rules = AdamW(ours, **settings), torch.optim.AdamW(theirs, **settings)
    made = {p: dict(rules[0].state[p]) for p in ours}
    for step in range(20):
        for parameters in (ours, theirs):
            for i, p in enumerate(parameters):
                p.grad = randn(*p.shape, seed=10 * step + i).float()
        for rule in rules:
            rule.step()
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)
        assert rules[0].state[left].keys() == rules[1].state[right].keys() == made[left].keys()
        for name, tensor in rules[0].state[left].items():
            assert tensor is made[left][name]
            torch.testing.assert_close(tensor, rules[1].state[right][name])


def test_it_is_the_equation():
    weight = nn.Parameter(randn(2, 3, seed=0))
    lr, beta1, beta2, eps, decay = 0.1, 0.8, 0.9, 1e-3, 0.2
    rule = AdamW([weight], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=decay)
    w, m, v = weight.detach().flatten().tolist(), [0.0] * 6, [0.0] * 6
    for step in range(1, 6):
        weight.grad = randn(2, 3, seed=step)
        for i, g in enumerate(weight.grad.flatten().tolist()):
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g * g
            root = (v[i] / (1 - beta2**step)) ** 0.5
            w[i] -= lr * decay * w[i]
            w[i] -= lr * m[i] / (1 - beta1**step) / (root + eps)
        rule.step()
        assert weight.flatten().tolist() == pytest.approx(w, rel=1e-12)


@pytest.mark.parametrize("variant", ["amsgrad", "fused"])
def test_a_variant_with_another_state_is_refused(variant: str):
    with pytest.raises(ValueError, match=variant):
        AdamW([nn.Parameter(torch.zeros(2, 2))], **{variant: True})


class Made(TorchDispatchMode):
    """Notes the tensors that operations make, but for numbers and what lies in tensors that are there."""

    def __init__(self, there: list[Tensor]) -> None:
        super().__init__()
        self._there = {tensor.untyped_storage().data_ptr() for tensor in there}
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        result = function(*arguments, **(options or {}))
        for tensor in (each for each in tree_leaves(result) if isinstance(each, Tensor)):
            if tensor.numel() > 1 and tensor.untyped_storage().data_ptr() not in self._there:
                self.shapes.append(tensor.shape)
        return result


def test_a_step_through_a_gate_makes_no_copy_of_anything():
    members = [nn.Parameter(randn(3, 4, seed=seed)) for seed in range(3)]
    rule = AdamW([{"params": members[:2]}, {"params": members[2:], "weight_decay": 0.0, "lr": 0.1}], lr=0.2)
    for gate in (None, StepGate(torch.tensor(True))):
        for p in members:
            p.grad = randn(3, 4, seed=9)
        tensors = [t for p in members for t in (p, p.grad, rule.state[p]["exp_avg"], rule.state[p]["exp_avg_sq"])]
        with Made(tensors) as made:
            rule.step_through(gate)
        assert made.shapes == []
