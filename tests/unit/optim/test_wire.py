"""Late and rounded sums against a loop that does the same arithmetic, on one process."""

from __future__ import annotations

import pytest
import torch

from hopescale.cost.updates import wire_bytes
from hopescale.optim.wire import decode, encode
from tests.support.late_sums import CADENCES, MOST, STEPS, Twin, make, rounded, take


@pytest.mark.parametrize("wire", ["bf16", "int8", "int4"])
def test_what_is_sent_and_what_is_kept_is_the_sum(wire: str):
    """Exactly: nothing is lost. One block of a row is small, one all zero, one not full."""
    sums = torch.randn(3, 64 * 3 + 5, generator=torch.Generator().manual_seed(0))
    sums[:, 64:128] *= 1e-6
    sums[1, 128:192] = 0
    coded = encode(sums, wire)
    assert coded.shape[0] == 3 and coded[0].nbytes == wire_bytes(sums.shape[1], wire)
    sent = decode(coded, sums.shape[1], wire)
    assert torch.equal(sent.double() + (sums - sent).double(), sums.double())
    if wire == "bf16":
        assert torch.equal(sent, sums.bfloat16().float())
    else:
        steps = torch.cat([block.abs().amax(1, keepdim=True).expand_as(block) for block in sums.split(64, 1)], 1)
        assert ((sent - sums).abs() <= steps / MOST[wire] * 0.5001).all()
        for row, of_row in zip(sums, sent, strict=True):
            torch.testing.assert_close(of_row[:64], rounded(row[:64], wire))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("wire", ["bf16", "int8", "int4"])
def test_what_is_not_finite_stays_visible(wire: str, value: float):
    sums = torch.ones(1, 130)
    sums[0, 70] = value
    assert not decode(encode(sums, wire), 130, wire).isfinite().all()


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_updates_are_those_of_a_loop(rule: str):
    optimizer, twin = make(rule), Twin(rule)
    for step in range(1, STEPS + 1):
        torch.testing.assert_close(take(optimizer, step), twin.step(step))
        for name, weight in twin.weights.items():
            torch.testing.assert_close(optimizer.parameters[name], weight, msg=lambda m, at=(step, name): f"{at}: {m}")


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_a_run_goes_on_bit_for_bit_at_every_step(rule: str):
    whole, parts = make(rule), make(rule)
    for step in range(1, STEPS + 1):
        take(whole, step)
        take(parts, step)
        saved = [
            {name: tensor.clone() for name, tensor in each.items()}
            for each in (parts.weights(), parts.state_dict(), parts.sums())
        ]
        waiting = {name for name, cadence in CADENCES.items() if cadence.is_on_its_way(step)}
        assert {name.removesuffix(".sent") for name in saved[2] if name.endswith(".sent")} == waiting
        parts = make(rule)
        parts.load(*saved[:2])
        parts.load_sums(saved[2], step)
        for name, parameter in whole.parameters.items():
            assert torch.equal(parts.parameters[name], parameter), (step, name)


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_a_bad_step_drops_what_was_sent_and_the_update_it_was_for(rule: str):
    """The sum of `a` that leaves at step 3 is for step 5; step 4 is bad, so that the first update comes at 9."""
    optimizer = make(rule)
    for step in range(1, STEPS + 1):
        before = optimizer.parameters["a"].detach().clone()
        if step == 4:
            optimizer.discard(step)
            assert not any(name.endswith(".sent") for name in optimizer.sums())
            assert not any(total.any() for total in optimizer.sums().values())
            continue
        take(optimizer, step)
        assert torch.equal(optimizer.parameters["a"], before) == (step < 9), step


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_what_is_gathered_beside_a_late_sum_is_looked_at(rule: str):
    """Step 5 updates `a` with what left at step 3, and the gradient of step 5 is for the next update."""
    optimizer = make(rule)
    for step in range(1, 5):
        take(optimizer, step)
    optimizer.parameters["a"].backward(torch.full((16, 16), float("nan")))
    assert "a" in optimizer.due(5)
    optimizer.reduce(["a"])
    assert optimizer.grad_norms({"due": ["a"]})["due"].isfinite()
    assert not optimizer.running_squares(["a"]).isfinite() and optimizer.running_squares(["b"]) is None
