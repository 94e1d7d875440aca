"""Ranks that share sequences wait for one another as little as the order of pieces allows.

The real loop runs for each rank alone, with messages that hold zeros, and writes down what it does. Then a simulator
lets all ranks do that together, each block taking one unit of time forward and two backward, and messages none.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hopescale.config.schema import CmsConfig, LevelConfig, LinearAttentionConfig, ModelConfig
from hopescale.data.loader import Batch
from hopescale.engine.schedule import IN_FLIGHT, Loop, plain_backward
from hopescale.engine.segments import Segments
from hopescale.models import Model
from hopescale.parallel.mesh import Mesh
from hopescale.parallel.relay import Like, Relay

PIECE, FORWARD, BACKWARD = 2, 1, 2
Program = list[tuple[str, Any]]


def program_of(rank: int, cp: int, segments: int, layers: int, sequences: int, monkeypatch: Any) -> Program:
    """Return what a rank does in a step: `work` of some time, `send` and `take` of a message."""
    program: Program = []

    def give(relay: Relay, tensors: list[Tensor], step: int, tag: int) -> None:
        program.append(("send", (rank, (rank + step) % cp, step, tag)))

    def take(relay: Relay, like: list[Like], device: torch.device, step: int, tag: int) -> list[Tensor]:
        program.append(("take", ((rank - step) % cp, rank, step, tag)))
        return [torch.zeros(each.shape, dtype=each.dtype) for each in like]

    def begun(_: Any, __: Any, output: tuple) -> None:
        program.append(("work", FORWARD))
        output[0].register_hook(lambda _: program.append(("work", BACKWARD)))

    monkeypatch.setattr(Relay, "give", give)
    monkeypatch.setattr(Relay, "take", take)
    config = ModelConfig(
        vocab_size=16,
        d_model=8,
        num_layers=layers,
        num_heads=2,
        mixers={"linear": LinearAttentionConfig(chunk_size=PIECE)},
        cms=CmsConfig(levels={"only": LevelConfig(d_ff=8)}),
    )
    model = Model(config)
    for block in model.blocks.values():
        block.register_forward_hook(begun)
    ring = SimpleNamespace(rank=lambda: rank, size=lambda: cp)
    own = Segments(replace(Mesh.alone(), cp_group=ring, cp_back_group=ring), segments)
    loop = Loop(model, plain_backward, own, torch.device("cpu"))
    tokens = torch.zeros(1, segments * PIECE, dtype=torch.int64)
    loop.train([Batch(tokens, tokens, tokens)] * sequences, lambda total: total, None)
    return program


def run_together(programs: list[Program]) -> float:
    """Return the time after which the last rank is done; fails if ranks wait for one another for ever."""
    times, left = [0.0] * len(programs), [deque(program) for program in programs]
    arrived: dict[tuple, deque[float]] = defaultdict(deque)
    while any(left):
        before = sum(map(len, left))
        for rank, program in enumerate(left):
            while program and (program[0][0] != "take" or arrived[program[0][1]]):
                what, value = program.popleft()
                if what == "work":
                    times[rank] += value
                elif what == "send":
                    arrived[value].append(times[rank])
                else:
                    times[rank] = max(times[rank], arrived[value].popleft())
        assert sum(map(len, left)) < before, "every rank waits for another"
    assert not any(arrived.values()), "a message was sent that nobody takes"
    return max(times)


@pytest.mark.parametrize(
    ("cp", "segments", "layers", "sequences"), [(4, 1, 4, 1), (2, 2, 3, 2), (4, 2, 4, 1), (3, 1, 4, 4), (4, 4, 5, 1)]
)
def test_ranks_idle_as_the_formula_says(
    cp: int, segments: int, layers: int, sequences: int, monkeypatch: pytest.MonkeyPatch
):
    programs = [program_of(rank, cp, segments, layers, sequences, monkeypatch) for rank in range(cp)]
    busy = {sum(value for what, value in program if what == "work") for program in programs}
    assert len(busy) == 1
    again = layers * sequences * (segments - 1) * FORWARD
    least = layers * sequences * segments * (FORWARD + BACKWARD)
    assert busy == {least + again}
    units = min(sequences, IN_FLIGHT) * segments * layers
    share = (cp - 1) / (units + cp - 1)
    idle = run_together(programs) - least - again  # what runs again waits for nobody
    assert idle / (idle + least) == pytest.approx(share, rel=1e-6)
