from __future__ import annotations

import pytest

from hopescale.common.errors import ConfigError
from hopescale.config.check import check, check_layout
from hopescale.config.layout import Layout, make_layout
from hopescale.config.load import load_recipe

RECIPE = """
model:
  vocab_size: 200
  d_model: 32
  num_layers: 4
  num_heads: 4
  cms: {levels: {fast: {d_ff: 64}, slow: {d_ff: 32, update_every_steps: 8}}}
data: {sources: {main: {path: data/main}}}
train: {seq_len: 32, micro_batch_size: 2, global_batch_tokens: 512}
"""

WEIGHTS = ("parallel.shard=node", "parallel.ranks_per_node=2", "parallel.shard_weights=true")

# overrides, number of ranks -> key, whole message
BROKEN = [
    (
        ["parallel.tp=3", "train.global_batch_tokens=384"],
        3,
        "model.num_heads",
        "4 is not a multiple of parallel.tp = 3",
    ),
    (["parallel.tp=64"], 64, "model.cms.levels.slow.d_ff", "32 is not a multiple of parallel.tp = 64"),
    (
        ["parallel.tp=3"],
        3,
        "model.vocab_size",
        "200, padded to a multiple of 128, is 256: not a multiple of parallel.tp = 3",
    ),
    (
        ["parallel.tp=2", "parallel.sequence_parallel=true", "train.seq_len=33", "train.global_batch_tokens=528"],
        2,
        "train.seq_len",
        "33 is not a multiple of parallel.tp = 2, which sequence_parallel needs",
    ),
    (["parallel.sequence_parallel=true"], 1, "parallel.sequence_parallel", "needs parallel.tp of 2 or more, it is 1"),
    (
        ["parallel.pp=2", "parallel.virtual_stages=3"],
        2,
        "model.num_layers",
        "4 is fewer than parallel.pp * parallel.virtual_stages = 2 * 3 = 6",
    ),
    (["parallel.virtual_stages=2"], 1, "parallel.virtual_stages", "2 needs parallel.pp of 2 or more, it is 1"),
    (
        ["parallel.dp=3"],
        3,
        "train.global_batch_tokens",
        "512 is not a multiple of seq_len * micro_batch_size * parallel.dp = 32 * 2 * 3 = 192",
    ),
    (
        ["parallel.dp=8", "parallel.pp=2", "parallel.virtual_stages=2"],
        16,
        "train.global_batch_tokens",
        "512 / (seq_len * micro_batch_size * parallel.dp) = 512 / (32 * 2 * 8) = 1 micro batches per replica, "
        "not a multiple of parallel.pp = 2, as parallel.virtual_stages = 2 needs",
    ),
    (
        ["parallel.tp=4", "model.mixers.hope.kind=attention", "model.mixers.hope.num_kv_heads=2"],
        4,
        "model.mixers.hope.num_kv_heads",
        "2 is not a multiple of parallel.tp = 4",
    ),
    (["parallel.zero=2", "parallel.dp=2", "parallel.pp=2"], 4, "parallel.zero", "2 needs parallel.pp of 1, it is 2"),
    (
        ["parallel.shard_weights=true", "parallel.dp=4"],
        4,
        "parallel.shard_weights",
        "true has no effect: parallel.shard is null",
    ),
    *(
        (
            [*WEIGHTS, f"{key}=2"],
            8,
            "parallel.shard_weights",
            f"true needs {key} of 1, it is 2",
        )
        for key in ("parallel.tp", "parallel.pp", "parallel.cp", "train.segments")
    ),
    (
        [*WEIGHTS, "train.compile=true"],
        4,
        "parallel.shard_weights",
        "true, but compiled chunks may hold weights that are freed",
    ),
    (
        [*WEIGHTS, "log.samples=['1']"],
        4,
        "log.samples",
        "needs a rank that holds the whole model, but parallel.shard_weights is true",
    ),
    (
        ["parallel.tp=2", "model.cms.levels.slow.wire=int8"],
        2,
        "model.cms.levels.slow.wire",
        "int8 rounds a norm's sum with its neighbours, which differ between 2 ranks of tp",
    ),
    (["parallel.zero=1", "parallel.dp=1"], 1, "parallel.zero", "1 has no effect: parallel.dp is 1"),
    (["parallel.shard=all", "parallel.dp=1"], 1, "parallel.shard", "all has no effect: parallel.dp is 1"),
    (
        ["parallel.shard=all", "parallel.zero=2", "parallel.dp=2"],
        2,
        "parallel.shard",
        "all, but parallel.zero is 2: both say what replicas share out",
    ),
    (
        ["parallel.ranks_per_node=2", "parallel.dp=4"],
        4,
        "parallel.ranks_per_node",
        "2 has no effect: parallel.shard is null",
    ),
    (
        ["parallel.shard=node", "parallel.ranks_per_node=2", "parallel.tp=2"],
        4,
        "parallel.ranks_per_node",
        "2 ranks hold 1 replicas, as parallel.tp is 2: parallel.shard = node needs 2 or more",
    ),
    (
        ["parallel.shard=node", "parallel.dp=8"],
        8,
        "parallel.shard",
        "node needs two nodes or more of 8 replicas each (parallel.ranks_per_node 8 / parallel.tp 1), and parallel.dp "
        "* parallel.cp is 8",
    ),
]


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE)
    return lambda *overrides: load_recipe(path, overrides)


@pytest.mark.parametrize(("overrides", "num_ranks", "key", "message"), BROKEN)
def test_degrees_that_are_set_are_checked_at_once(load, overrides, num_ranks, key, message):
    loaded = load(*overrides)
    found = {problem.key: problem for problem in check(loaded.config, loaded.origins)}
    assert found[key].message == message


@pytest.mark.parametrize(("overrides", "num_ranks", "key", "message"), BROKEN)
@pytest.mark.parametrize("axis", ["dp", "tp", "pp"])
def test_a_degree_that_is_open_is_checked_with_the_layout(load, overrides, num_ranks, key, message, axis):
    loaded = load(*overrides)
    layout = make_layout(loaded.config, num_ranks)
    left_open = load(*overrides, f"parallel.dp={layout.dp}", f"parallel.{axis}=null")
    assert make_layout(left_open.config, num_ranks) == layout
    with pytest.raises(ConfigError) as caught:
        check_layout(left_open.config, layout, left_open.origins)
    assert message in [problem.message for problem in caught.value.problems if problem.key == key]


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.tp=null", "parallel.dp=1", "parallel.sequence_parallel=true"],
        ["parallel.pp=null", "parallel.dp=1", "parallel.virtual_stages=2"],
        ["parallel.zero=2"],
        ["parallel.zero=3", "parallel.pp=null", "parallel.dp=2"],
    ],
)
def test_nothing_is_said_of_a_degree_that_is_open(load, overrides):
    loaded = load(*overrides)
    assert check(loaded.config, loaded.origins) == []


@pytest.mark.parametrize(
    ("overrides", "layout"),
    [
        ([], Layout()),
        ([], Layout(dp=8)),
        (["parallel.zero=3", "parallel.tp=2", "train.recompute=block"], Layout(dp=2, tp=2)),
        (["parallel.pp=2", "parallel.zero=1"], Layout(dp=4, pp=2)),
        (["parallel.shard=node", "parallel.ranks_per_node=4", "parallel.tp=2"], Layout(dp=4, tp=2, node_replicas=2)),
        (["parallel.pp=2", "parallel.virtual_stages=2"], Layout(dp=4, pp=2, virtual_stages=2)),
        (["parallel.tp=4", "parallel.sequence_parallel=true"], Layout(dp=2, tp=4, sequence_parallel=True)),
        (["parallel.pp=3"], Layout(pp=3)),
    ],
)
def test_what_splits_evenly_passes(load, overrides, layout):
    loaded = load(*overrides)
    assert check(loaded.config, loaded.origins) == []
    assert make_layout(loaded.config, layout.num_ranks) == layout
    check_layout(loaded.config, layout, loaded.origins)


def test_all_that_does_not_split_is_told_at_once_with_its_origin(load):
    loaded = load("parallel.zero=1", "parallel.tp=null", "parallel.dp=1", "model.num_heads=8", "parallel.pp=1")
    (zero,) = check(loaded.config, loaded.origins)
    assert (zero.key, zero.origin) == ("parallel.zero", "command line")
    with pytest.raises(ConfigError) as caught:
        check_layout(loaded.config, make_layout(loaded.config, 3), loaded.origins)
    origins = {problem.key: problem.origin for problem in caught.value.problems}
    assert {"parallel.zero", "model.num_heads", "model.vocab_size", "model.cms.levels.fast.d_ff"} <= set(origins)
    assert origins["model.num_heads"] == "command line" and origins["model.vocab_size"].endswith("x.yaml")


def test_one_degree_at_most_is_open(load):
    (problem,) = check(load("parallel.tp=null").config)
    assert problem.key == "parallel" and problem.message == "dp and tp are null, at most one may be"


def test_the_first_step_waits_as_long_as_any(load):
    (problem,) = check(load("parallel.timeout_s=2000").config)
    assert problem.key == "parallel.first_step_timeout_s"
    assert problem.message == "1800 is below parallel.timeout_s = 2000"


@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize("name", ["dp", "tp", "pp", "virtual_stages", "timeout_s", "first_step_timeout_s"])
def test_numbers_out_of_range_break_no_rule(load, name, value):
    switches = ("parallel.sequence_parallel=true", "parallel.pp=2", "parallel.virtual_stages=2")
    loaded = load(*switches, f"parallel.{name}={value}")
    found = {problem.key: problem.message for problem in check(loaded.config, loaded.origins)}
    assert found[f"parallel.{name}"] == f"must be at least 1, is {value}"


@pytest.mark.parametrize(("key", "value"), [("parallel.zero", 4), ("train.replica_check_every", 0)])
def test_other_numbers_out_of_range(load, key, value):
    assert key in [problem.key for problem in check(load(f"{key}={value}").config)]
