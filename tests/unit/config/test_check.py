from __future__ import annotations

import pytest

from hopescale.common.errors import ConfigError
from hopescale.config import check_cadence, check_model, check_optim, check_parallel, check_train
from hopescale.config.check import CHECKS, check, require_valid
from hopescale.config.load import load_recipe
from hopescale.config.schema import RunConfig

GOOD = """
name: x
model:
  vocab_size: 128
  d_model: 32
  num_heads: 4
  cms: {levels: {fast: {d_ff: 64}, slow: {d_ff: 64, update_every_steps: 8}}}
data: {sources: {main: {path: data/main}}}
train: {steps: 100, seq_len: 32, micro_batch_size: 2, global_batch_tokens: 128}
"""
ATTENTION = "model.mixers.hope.kind=attention"
TITANS = "model.mixers.hope.kind=titans"
MIXER = "model.mixers.hope"
PROJECTION = f"{MIXER}.projection_chunk_size"
STATIC = [f"{MIXER}.{setting}" for setting in ("memory=linear", "objective=dot", "adaptive=[]", "targets=value")]
SCALING = "model.mixers.hope.rope_scaling"
LOCAL = "model.mixers={hope: {}, local: {kind: attention, window: 8}}"
SYNTHETIC = "data.sources.s.synthetic"
LEVEL = "model.cms.levels.slow"
DEPTH = "model.cms.placement=depth"

# overrides that break one rule -> the key that is named, part of its message
BROKEN = [
    (["train.compile=true", "model.within_documents=true"], "train.compile", "not go with model.within_documents"),
    (["train.compile=true", "parallel.cp=2", TITANS, f"{MIXER}.composition=mag"], "train.compile", "and MAG or MAL"),
    (["train.compile=true", f"{MIXER}.reset_every=64"], "train.compile", "does not go with reset_every"),
    (["train.steps=0", f"{LEVEL}=null"], "train.steps", "must be at least 1, is 0"),
    (["model.mixers.hope.eta_max=2.5"], f"{MIXER}.eta_max", "in (0, 2]"),
    (["model.mixers.hope.alpha_init=1"], f"{MIXER}.alpha_init", "in (0, 1)"),
    (["optim.betas=[0.9, 1]"], "optim.betas", "in [0, 1)"),
    (["optim.groups.no_decay.betas=[0.9, 1]"], "optim.groups.no_decay.betas", "in [0, 1)"),
    (["data.sources.main.weight=0"], "data.sources.main.weight", "above 0"),
    (["train.loss_spike=0"], "train.loss_spike", "above 0"),
    ([ATTENTION, "train.compile=true"], "train.compile", "no mixer has a chunk loop"),
    (
        ["train.compile=true", *STATIC],
        "train.compile",
        "no mixer has a chunk loop",
    ),
    ([ATTENTION, "train.backend=torch"], "train.backend", "mixers are attention"),
    (["train.backend=cpp", "train.compile=true"], "train.backend", "train.compile takes the chunk loop"),
    (
        ["train.backend=cpp", "train.recompute=reverse", "model.num_heads=1", f"{MIXER}.chunk_size=4"],
        "train.backend",
        "train.recompute: reverse takes the chunk loop",
    ),
    (
        [f"{MIXER}.far={{chunk_size: 96}}"],
        f"{MIXER}.far.chunk_size",
        "96 is not a multiple of the mixer's chunk_size = 64",
    ),
    (
        [f"{MIXER}.far={{}}", "train.seq_len=2048"],
        f"{MIXER}.far.chunk_size",
        "2048 is not below train.seq_len = 2048: what it writes is never read",
    ),
    (
        [f"{MIXER}={{retention: false, adaptive: [k], far: {{alpha_init: 0.9}}}}"],
        f"{MIXER}.far.alpha_init",
        "has no effect: retention is off",
    ),
    ([f"{MIXER}.reset_every=96"], f"{MIXER}.reset_every", "96 is not a multiple of chunk_size = 64"),
    (
        [f"{MIXER}.reset_every=192", f"{PROJECTION}=128"],
        f"{MIXER}.reset_every",
        "192 is not a multiple of projection_chunk_size = 128",
    ),
    (["train.backend=cpp", f"{PROJECTION}=128"], "train.backend", "projection_chunk_size is 128, chunk_size 64"),
    (
        ["train.backend=triton", f"{MIXER}.memory_dim=48"],
        "train.backend",
        "memories are 48 wide, not 16, 32, 64 or 128",
    ),
    (["train.backend=cpp", f"{MIXER}.memory_dim=24"], "train.backend", "memories are 24 wide, not a multiple of 16"),
    (["train.kernel_precision=bf16", "train.backend=torch"], "train.kernel_precision", "memories run in torch"),
    ([ATTENTION, "train.kernel_precision=tf32"], "train.kernel_precision", "no mixer has memories"),
    ([ATTENTION, "train.recompute=reverse"], "train.recompute", "no mixer has a chunk loop"),
    (
        ["train.recompute=reverse", *STATIC],
        "train.recompute",
        "no mixer has a chunk loop",
    ),
    (["train.recompute=reverse"], "train.recompute", "what model.mixers.hope.chunk_size = 64 tokens write"),
    (
        ["train.recompute=reverse", f"{MIXER}.chunk_size=4", f"{PROJECTION}=16"],
        "train.recompute",
        "projection_chunk_size = 16 tokens write",
    ),
    (["train.recompute=reverse", f"{MIXER}.chunk_size=4", "train.seq_len=4"], "train.recompute", "is one chunk"),
    (["data.staged=/tmp", "data.sources.main=null", f"{SYNTHETIC}={{}}"], "data.staged", "no source is a folder"),
    (["checkpoint.keep_last=0"], "checkpoint.keep_last", "at least 1"),
    (["log.every=0"], "log.every", "at least 1"),
    (["name=a/b"], "name", "cannot name a folder"),
    (["name="], "name", "cannot name a folder"),
    (["model.num_heads=5"], "model.d_model", "32 is not a multiple of num_heads = 5"),
    ([ATTENTION, "model.head_dim=3"], "model.head_dim", "even head dim"),
    ([ATTENTION, "model.mixers.hope.num_kv_heads=3"], "model.mixers.hope.num_kv_heads", "3 does not divide"),
    ([ATTENTION, f"{SCALING}={{kind: linear, first_context: 64}}"], f"{SCALING}.first_context", "kind is linear"),
    ([ATTENTION, f"{SCALING}={{low_freq_factor: 4}}"], f"{SCALING}.high_freq_factor", "not above low_freq_factor = 4"),
    (["model.mixers.hope=null"], "model.mixers", "no mixer"),
    ([LOCAL], "model.pattern", "is empty, and there are 2 mixers: hope, local"),
    ([LOCAL, "model.pattern=[hope]"], "model.mixers.local", "model.pattern does not name it"),
    (["model.pattern=[hope, local]"], "model.pattern", "holds local, which is no mixer"),
    ([LOCAL, "model.pattern=[hope, local]", "model.num_layers=1"], "model.pattern", "names 2 blocks, but"),
    (
        ["model.transfer.base_width=32", "model.mixers={hope: {}, b: {memory_dim: 8}}", "model.pattern=[hope, b]"],
        "model.mixers.b.memory_dim",
        "that of hope is null",
    ),
    (["model.within_documents=true", "data.sources.main=null", f"{SYNTHETIC}={{}}"], "model.within_documents", "row"),
    ([f"{MIXER}.memory=linear", f"{MIXER}.memory_dim=8"], f"{MIXER}.memory_dim", "memory is linear"),
    ([f"{MIXER}.adaptive=[k, k]"], f"{MIXER}.adaptive", "k is listed 2 times"),
    ([f"{MIXER}.retention=false"], f"{MIXER}.adaptive", "retention is off"),
    ([f"{MIXER}.targets=value"], f"{MIXER}.targets", "needs adaptive: []"),
    ([f"{MIXER}.targets=value", f"{MIXER}.adaptive=[]", f"{MIXER}.query=memory"], f"{MIXER}.targets", "query: static"),
    ([f"{PROJECTION}=96"], PROJECTION, "not a multiple of chunk_size = 64"),
    ([f"{PROJECTION}=64", f"{MIXER}.adaptive=[]"], PROJECTION, "no projection is a memory"),
    ([f"{MIXER}.momentum=false", f"{MIXER}.mu_init=0.4"], f"{MIXER}.mu_init", "momentum is off"),
    ([f"{MIXER}.momentum=false", f"{MIXER}.momentum_write=whole"], f"{MIXER}.momentum_write", "momentum is off"),
    ([f"{MIXER}={{retention: false, adaptive: [k], alpha_init: 0.4}}"], f"{MIXER}.alpha_init", "retention is off"),
    ([f"{MIXER}.objective=dot", f"{MIXER}.error_cap=1"], f"{MIXER}.error_cap", "objective is dot"),
    ([TITANS, f"{MIXER}.adaptive=[k]"], f"{MIXER}.adaptive", "titans has static maps"),
    ([TITANS, f"{MIXER}.far={{chunk_size: 256}}"], f"{MIXER}.far", "the compositions of titans have one memory"),
    ([TITANS, f"{MIXER}.reset_every=64"], f"{MIXER}.reset_every", "do not start anew"),
    ([TITANS, f"{MIXER}.gate=true"], f"{MIXER}.gate", "no place in mac"),
    ([TITANS, f"{MIXER}.window=64"], f"{MIXER}.window", "segments of chunk_size = 64"),
    ([TITANS, "model.head_dim=3"], "model.head_dim", "rotates pairs"),
    (["model.cms.levels.fast=null", f"{LEVEL}=null"], "model.cms.levels", "no level"),
    ([DEPTH, f"{LEVEL}.d_ff=32"], "model.cms.placement", "levels of one d_ff, they have 32, 64"),
    ([DEPTH, "model.num_layers=1"], "model.cms.placement", "1 blocks, 2 levels"),
    ([DEPTH, "model.cms.variant=independent"], "model.cms.variant", "no effect"),
    ([DEPTH, "parallel.pp=2"], "model.cms.placement", "needs parallel.pp of 1, it is 2"),
    ([f"{LEVEL}.phase=8"], f"{LEVEL}.phase", "8 is not below update_every_steps = 8"),
    ([f"{LEVEL}.rolling=true", f"{LEVEL}.update_every_steps=1"], f"{LEVEL}.rolling", "update_every_steps is 1"),
    ([f"{LEVEL}.rolling=true", "model.num_layers=1"], f"{LEVEL}.rolling", "1 block has the level"),
    ([f"{LEVEL}.lag=8"], f"{LEVEL}.lag", "8 is not below update_every_steps = 8"),
    (["model.cms.levels.fast.lag=1"], "model.cms.levels.fast.lag", "1 is not below update_every_steps = 1"),
    (["model.cms.levels.fast.wire=int8"], "model.cms.levels.fast.wire", "outlives a step"),
    (["parallel.zero=2", f"{LEVEL}.lag=1"], f"{LEVEL}.lag", "parallel.zero = 2 sums"),
    (["parallel.zero=3", f"{LEVEL}.wire=bf16"], f"{LEVEL}.wire", "parallel.zero = 3 sums"),
    ([f"{LEVEL}.wire=int4", "parallel.tp=2"], f"{LEVEL}.wire", "differ between 2 ranks of tp"),
    ([f"{LEVEL}.lag=1", "parallel.shard=node"], f"{LEVEL}.lag", "shared out inside nodes"),
    ([f"{LEVEL}.wire=bf16", "parallel.shard=node"], f"{LEVEL}.wire", "shared out inside nodes"),
    (["optim.groups.m={rule: dgd, match: ['*.up.weight']}", f"{LEVEL}.lag=1"], f"{LEVEL}.lag", "dgd sends Gram"),
    (["data.sources.main=null"], "data.sources", "no source"),
    (["data.sources.main.path=null"], "data.sources.main", "neither"),
    (["data.sources.main.synthetic={}"], "data.sources.main", "both"),
    (["data.sources.main.path="], "data.sources.main.path", "empty"),
    ([f"{SYNTHETIC}.num_symbols=127"], f"{SYNTHETIC}.num_symbols", "exceed model.vocab_size = 128"),
    (["optim.groups.decay=null"], "optim.groups", "0 groups"),
    (["optim.groups.more={}"], "optim.groups", "2 groups have match: null (decay, more)"),
    (["optim.groups.no_decay.match=[]"], "optim.groups.no_decay.match", "no pattern"),
    (["optim.groups.no_decay.match=['']"], "optim.groups.no_decay.match", "empty one"),
    (["optim.schedule.decay_fraction=0.1"], "optim.schedule.decay_fraction", "schedule.name is cosine"),
    (["optim.accumulate=mean", f"{LEVEL}=null"], "optim.accumulate", "no level has update_every_steps above 1"),
    (["train.global_batch_tokens=100"], "train.global_batch_tokens", "32 * 2 = 64"),
    (["checkpoint.every=null", "checkpoint.keep_every=5"], "checkpoint.keep_every", "checkpoint.every is null"),
    (["checkpoint.every=10", "checkpoint.keep_every=15"], "checkpoint.keep_every", "not a multiple"),
    (["checkpoint.every=10", "checkpoint.memory.every=10"], "checkpoint.memory.every", "10 is not below"),
    (["checkpoint.memory.folder=/tmp"], "checkpoint.memory.folder", "checkpoint.memory.every is null"),
]  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(GOOD)
    return path


def problems_of(recipe, *overrides):
    loaded = load_recipe(recipe, overrides)
    return check(loaded.config, loaded.origins)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [ATTENTION, "model.mixers.hope.qk_norm=true"],
        ["model.num_heads=5", "model.head_dim=7"],
        [f"{MIXER}.retention=false", f"{MIXER}.adaptive=[k, v, eta]", f"{MIXER}.momentum=false"],
        [f"{MIXER}.targets=value", f"{MIXER}.adaptive=[]", f"{MIXER}.error_cap=2"],
        [f"{MIXER}.chunk_size=16", f"{MIXER}.projection_chunk_size=64"],
        [f"{MIXER}.chunk_size=16", f"{MIXER}.projection_chunk_size=64", f"{MIXER}.reset_every=128"],
        [f"{LEVEL}.update_every_steps=101", f"{LEVEL}.phase=1"],
        [f"{LEVEL}={{rolling: true, lag: 7, wire: int4}}", "parallel.zero=1"],
        [f"{LEVEL}={{lag: 1, wire: bf16}}", "parallel.tp=2", "checkpoint.memory.every=10"],
        ["data.sources.main={path: null, synthetic: {num_symbols: 126}}"],
        ["optim.schedule={name: wsd, warmup_steps: 50, decay_fraction: 0.5}"],
        ["checkpoint.every=10", "checkpoint.keep_every=30"],
        ["checkpoint.every=null", "checkpoint.memory={every: 10, folder: /tmp}"],
        ["optim.groups.no_decay=null"],
        ["optim.accumulate=mean"],
        [ATTENTION, "train.recompute=memory", "parallel.zero=3"],
        ["train.compile=true"],
        ["train.backend=cpp", "model.num_heads=1"],
        ["train.kernel_precision=bf16", "model.num_heads=1"],
        ["train.backend=torch", f"{PROJECTION}=128"],
        ["train.recompute=reverse", f"{MIXER}.chunk_size=4"],
        ["train.recompute=reverse", f"{MIXER}.chunk_size=2", f"{PROJECTION}=4", f"{MIXER}.momentum=false"],
        ["train.backend=triton", "model.num_heads=1", *STATIC],
        ["train.compile=true", *STATIC, f"{MIXER}.targets=self"],
    ],
    ids=str,
)
def test_good_configs_pass(recipe, overrides):
    assert problems_of(recipe, *overrides) == []


@pytest.mark.parametrize(("overrides", "key", "message"), BROKEN)
def test_each_rule_names_its_key(recipe, overrides, key, message):
    found = [problem for problem in problems_of(recipe, *overrides) if message in problem.message]
    assert [problem.key for problem in found] == [key]


def test_all_rules_speak_at_once_with_origins(recipe):
    overrides = ["train.steps=0", "model.num_heads=0", "train.seq_len=0", "name=a/b", "data.sources.main=null"]
    problems = problems_of(recipe, *overrides)
    keys = {problem.key: problem.origin for problem in problems}
    assert {"train.steps", "model.num_heads", "train.seq_len", "name", "data.sources"} <= set(keys)
    assert keys["name"] == "command line" and keys["data.sources"] is None


@pytest.mark.parametrize("key", ["model.num_heads", "train.seq_len", f"{MIXER}.chunk_size", "checkpoint.every"])
@pytest.mark.parametrize("mixer", ["hope.kind=self_modifying", "local={kind: attention}"])
@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize("also", [[], ["train.backend=cpp"], ["train.recompute=reverse"]], ids=str)
def test_numbers_out_of_range_break_no_rule(recipe, key, mixer, value, also):
    overrides = [f"{key}={value}", f"model.mixers.{mixer}", "checkpoint.keep_every=3", *also]
    assert key in [problem.key for problem in problems_of(recipe, *overrides)]


def test_the_nearest_batch_sizes_are_offered(recipe):
    (problem,) = problems_of(recipe, "train.global_batch_tokens=100")
    assert problem.hint == "nearest: 64 and 128"
    (problem,) = problems_of(recipe, "train.global_batch_tokens=10")
    assert problem.hint == "nearest: 64"
    (problem,) = problems_of(recipe, "train.micro_batch_size=6", "train.global_batch_tokens=640")
    assert problem.hint.startswith("train.micro_batch_size=5 divides it; otherwise nearest: ")


def test_require_valid_raises_all(recipe):
    assert require_valid(load_recipe(recipe)).config.name == "x"
    with pytest.raises(ConfigError) as caught:
        require_valid(load_recipe(recipe, ["name=a/b", "train.steps=0"]))
    assert {"name", "train.steps"} <= {problem.key for problem in caught.value.problems}


def test_the_bare_schema_lacks_only_levels_and_data():
    assert {problem.key for problem in check(RunConfig())} == {"model.cms.levels", "data.sources"}


@pytest.mark.parametrize("module", [check_cadence, check_model, check_optim, check_parallel, check_train])
def test_every_rule_is_registered(module):
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    rules = {value for name, value in own.items() if not name.startswith("_")}
    assert rules <= set(module.CHECKS) <= set(CHECKS)
