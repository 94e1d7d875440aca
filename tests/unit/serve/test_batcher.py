from __future__ import annotations

import pytest

from hopescale.ops.cpp import build
from hopescale.serve.batcher import Batcher, Failed, Request
from tests.support.loaded import make_loaded

ROTARY = {"mixers": {"retnet": {"kind": "linear_attention", "decay": "fixed", "erase": False, "rotary": True}}}


@pytest.mark.parametrize("settings", [{"kind": "hope"}, {"kind": "linear"}, ROTARY, {"kind": "hope_attention"}])
def test_requests_at_unlike_places_share_every_pass(settings: dict):
    model = make_loaded(**settings).model.double()
    prompts = [[5, 6, 7], [8, 9, 4, 3, 2], [7] * 10, [4, 5, 9]]

    def answers(together: list[list[int]]) -> tuple[list[list[int]], int]:
        running = Batcher(model)
        asked = [running.submit(Request(prompt, None, 9)) for prompt in together]
        with running:
            return [list(request.tokens()) for request in asked], running.passes

    alone = [answers([prompt]) for prompt in prompts]
    found, passes = answers(prompts)
    assert found == [tokens for (tokens,), _ in alone] and len({*map(tuple, found)}) > 1
    assert passes == 8 and all(each == 8 for _, each in alone)


@pytest.mark.skipif(build.problem() is not None, reason="no C++ compiler could build the library")
def test_each_block_is_one_call_for_a_request_alone():
    model = make_loaded(num_heads=1).model
    with Batcher(model) as running:
        assert len(list(running.submit(Request([5, 6, 7], None, 3)).tokens())) == 3
    assert all(block.lean.known[1] is not None for block in model.blocks.values())


def test_a_prompt_that_nobody_waits_for_is_not_read():
    with Batcher(make_loaded().model) as running:
        request = Request([5] * 9, None, max_tokens=0)
        request.is_left = True
        with pytest.raises(Failed, match="the client has left"):
            running.submit(request).read()
        assert running.tokens_read == 0 and running.num_open == 0
