from __future__ import annotations

import json

from hopescale.config.layout import Layout
from hopescale.config.model_shape import levels_of_block
from hopescale.config.plan import make_plan
from hopescale.config.schema import (
    AttentionConfig,
    CmsConfig,
    LevelConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    SelfModifyingConfig,
    TrainConfig,
)


def test_plan_of_a_self_modifying_run():
    model = ModelConfig(vocab_size=129, d_model=96, num_heads=4)
    train = TrainConfig(steps=10, seq_len=32, micro_batch_size=2, global_batch_tokens=256)
    plan = make_plan(RunConfig(model=model, train=train))
    assert json.loads(json.dumps(plan.to_dict())) == {
        "dp": 1,
        "tp": 1,
        "pp": 1,
        "cp": 1,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "grad_accumulation": 4,
        "total_tokens": 2560,
        "total_sequences": 80,
        "head_dim": 24,
        "memory_dim": {"hope": 24},
        "projection_chunk_size": {"hope": 64},
        "padded_vocab_size": 256,
    }


def test_widths_that_are_set_win():
    mixer = SelfModifyingConfig(memory_dim=7, chunk_size=4, projection_chunk_size=16)
    plan = make_plan(RunConfig(model=ModelConfig(vocab_size=128, head_dim=5, mixers={"hope": mixer})))
    assert (plan.head_dim, plan.padded_vocab_size) == (5, 128)
    assert (plan.memory_dim, plan.projection_chunk_size) == ({"hope": 7}, {"hope": 16})


def test_other_mixers_and_memories_have_no_hidden_width():
    attention = make_plan(RunConfig(model=ModelConfig(mixers={"attention": AttentionConfig()})))
    assert attention.memory_dim == attention.projection_chunk_size == {}
    linear = make_plan(RunConfig(model=ModelConfig(mixers={"hope": SelfModifyingConfig(memory="linear")})))
    assert linear.memory_dim == {"hope": None} and linear.projection_chunk_size == {"hope": 64}


def test_accumulation_is_that_of_a_replica():
    train = TrainConfig(seq_len=32, micro_batch_size=2, global_batch_tokens=512)
    plan = make_plan(RunConfig(train=train), Layout(dp=4, tp=2, pp=3))
    assert (plan.dp, plan.tp, plan.pp) == (4, 2, 3)
    assert (plan.global_batch_size, plan.grad_accumulation) == (16, 2)


def test_without_a_layout_the_plan_is_for_the_fewest_ranks():
    train = TrainConfig(seq_len=32, micro_batch_size=2, global_batch_tokens=512)
    plan = make_plan(RunConfig(train=train, parallel=ParallelConfig(dp=2, tp=None, pp=2)))
    assert (plan.dp, plan.tp, plan.pp, plan.grad_accumulation) == (2, 1, 2, 4)


def test_levels_are_sorted_by_period_and_dealt_out_over_depth():
    levels = {
        "slow": LevelConfig(update_every_steps=8),
        "fast": LevelConfig(),
        "mid": LevelConfig(update_every_steps=2),
    }
    everywhere = ModelConfig(num_layers=7, cms=CmsConfig(levels=levels))
    assert [list(levels_of_block(everywhere, number)) for number in (0, 6)] == [["fast", "mid", "slow"]] * 2
    deep = ModelConfig(num_layers=7, cms=CmsConfig(placement="depth", levels=levels))
    dealt = [*levels_of_block(deep, 0), *(name for number in range(1, 7) for name in levels_of_block(deep, number))]
    assert dealt == ["fast", "fast", "fast", "mid", "mid", "slow", "slow"]
