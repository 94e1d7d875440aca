from __future__ import annotations

import pytest
import torch
from torch import nn

from hopescale.parallel.deferred import defer, is_deferred, move_into, zeros_lent

CPU = torch.device("cpu")


def bytes_of(parameter: nn.Parameter) -> int:
    return parameter.untyped_storage().nbytes()


def test_a_deferred_parameter_has_no_memory_until_it_is_moved():
    parameter = nn.Parameter(torch.empty(3, 5))
    defer(parameter, torch.bfloat16, CPU, lambda entries: torch.full((len(entries),), 1.0 + 2**-12))
    assert is_deferred(parameter) and bytes_of(parameter) == 0 and parameter.shape == (3, 5)
    flat = torch.zeros(20, dtype=torch.bfloat16)
    move_into(parameter, flat[2:17].view(3, 5))
    assert not is_deferred(parameter) and parameter.equal(torch.ones(3, 5, dtype=torch.bfloat16))
    assert flat.tolist() == [0, 0, *[1] * 15, 0, 0, 0]


def test_some_entries_alone_can_be_drawn():
    parameter, flat = nn.Parameter(torch.empty(3, 5)), torch.zeros(20)
    defer(parameter, torch.float32, CPU, lambda entries: 1 + torch.tensor([*entries]).float())
    move_into(parameter, flat[2:17].view(3, 5), range(4, 7))
    assert flat.tolist() == [0] * 6 + [5, 6, 7] + [0] * 11 and parameter[1, 0] == 6


def test_a_checkpoint_sets_what_has_no_initial_values():
    parameter, flat = nn.Parameter(torch.empty(4)), torch.arange(4.0)
    defer(parameter, torch.float32, CPU, None)
    move_into(parameter, flat)
    assert parameter.tolist() == [0, 1, 2, 3] and not is_deferred(parameter)


def test_others_keep_their_values():
    parameter, flat = nn.Parameter(torch.arange(4.0)), torch.zeros(4)
    move_into(parameter, flat)
    assert flat.tolist() == [0, 1, 2, 3] and parameter.data_ptr() == flat.data_ptr()


def test_zeros_are_lent_and_taken_back():
    layer = nn.Linear(3, 2)
    defer(layer.weight, torch.float32, CPU, lambda entries: torch.ones(len(entries)))
    with zeros_lent(layer):
        assert layer(torch.ones(3)).equal(layer.bias)
    assert bytes_of(layer.weight) == 0 and bytes_of(layer.bias) == 8
    move_into(layer.weight, torch.zeros(2, 3))
    assert layer.weight.equal(torch.ones(2, 3))


def test_what_is_lent_is_taken_back_after_an_error():
    layer = nn.Linear(3, 2)
    defer(layer.weight, torch.float32, CPU, None)
    with pytest.raises(ValueError, match="in between"), zeros_lent(layer):
        raise ValueError("in between")
    assert bytes_of(layer.weight) == 0
