from __future__ import annotations

import pytest

from hopescale.common.errors import ConfigError
from hopescale.config.layout import Layout, make_layout, smallest_layout
from hopescale.config.schema import ParallelConfig, RunConfig


def config_of(**parallel) -> RunConfig:
    return RunConfig(parallel=ParallelConfig(**parallel))


@pytest.mark.parametrize(
    ("parallel", "num_ranks", "layout"),
    [
        ({}, 1, Layout()),
        ({}, 6, Layout(dp=6)),
        ({"tp": 2, "pp": 2}, 8, Layout(dp=2, tp=2, pp=2)),
        ({"dp": 2, "tp": None}, 8, Layout(dp=2, tp=4)),
        ({"dp": 1, "tp": 3, "pp": None}, 6, Layout(tp=3, pp=2)),
        ({"dp": 2, "tp": 3, "pp": 2}, 12, Layout(dp=2, tp=3, pp=2)),
        ({"tp": 2, "sequence_parallel": True}, 2, Layout(tp=2, sequence_parallel=True)),
        ({"tp": 2, "cp": 2}, 8, Layout(dp=2, tp=2, cp=2)),
        ({"pp": 2, "virtual_stages": 3}, 4, Layout(dp=2, pp=2, virtual_stages=3)),
    ],
)
def test_what_is_left_open_takes_what_remains(parallel, num_ranks, layout):
    made = make_layout(config_of(**parallel), num_ranks)
    assert made == layout and made.num_ranks == num_ranks


@pytest.mark.parametrize(
    ("parallel", "num_ranks", "message", "hint"),
    [
        (
            {"dp": 4, "tp": 2},
            16,
            "dp*pp*tp = 4*1*2 = 8, but the job has 16 ranks",
            'set parallel.dp=8, or leave it out for "what remains"',
        ),
        (
            {"dp": 4, "tp": 2},
            1,
            "dp*pp*tp = 4*1*2 = 8, but the job has 1 rank",
            "start 8 ranks, or change a degree",
        ),
        (
            {"tp": 2, "pp": 3},
            8,
            "dp is what remains of 8 ranks, but pp*tp = 3*2 = 6 does not divide 8",
            "start 6 ranks or a multiple, as with --nproc 6, or change parallel.pp or parallel.tp",
        ),
        (
            {"tp": 4},
            1,
            "dp is what remains of 1 rank, but pp*tp = 1*4 = 4 does not divide 1",
            "start 4 ranks or a multiple, as with --nproc 4, or change parallel.tp",
        ),
        (
            {"dp": 2, "tp": 1, "pp": None},
            3,
            "pp is what remains of 3 ranks, but dp*tp = 2*1 = 2 does not divide 3",
            "start 2 ranks or a multiple, as with --nproc 2, or change parallel.dp",
        ),
    ],
)
def test_degrees_that_do_not_multiply_to_the_ranks(parallel, num_ranks, message, hint):
    with pytest.raises(ConfigError) as caught:
        make_layout(config_of(**parallel), num_ranks)
    (problem,) = caught.value.problems
    assert (problem.key, problem.message, problem.hint) == ("parallel", message, hint)


def test_the_smallest_layout():
    assert smallest_layout(RunConfig()) == Layout()
    assert smallest_layout(config_of(dp=None, tp=2, pp=3, virtual_stages=2)) == Layout(tp=2, pp=3, virtual_stages=2)
