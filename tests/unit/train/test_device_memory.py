"""Sizes that no machine can hold end in one message, not in a traceback."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hopescale.common.errors import ConfigError
from hopescale.common.machine import machine_memory
from hopescale.config.layout import Layout
from hopescale.config.load import load_recipe
from hopescale.cost.params import count_params
from hopescale.parallel.mesh import Mesh
from hopescale.train import device_memory
from hopescale.train.device_memory import (
    RankMemory,
    check_device_memory,
    memory_errors_explained,
    memory_of,
    run_here,
    tight_memory,
)
from hopescale.train.setup import build_state

CPU = torch.device("cpu")
OF_CPU = RankMemory(CPU, 64 * 2**30)


@pytest.mark.parametrize("overrides", [["model.d_model=1M", "model.vocab_size=100M"], ["model.num_layers=100M"]])
def test_a_model_larger_than_the_memory_is_refused_before_it_is_built(overrides: list[str]):
    config = load_recipe("debug", overrides).config
    with pytest.raises(ConfigError, match=r"weights and optimizer state take .*TiB, but cpu has .*GiB"):
        build_state(config, Layout(), Mesh.alone(), CPU)


def test_a_model_that_fits_passes():
    check_device_memory(load_recipe("debug").config, Layout(), OF_CPU)


def test_a_step_that_exceeds_the_device_by_its_plan_is_refused_and_one_that_nearly_does_is_told(monkeypatch):
    config, gib = load_recipe("debug", ["train.micro_batch_size=8"]).config, 2**30
    monkeypatch.setattr(device_memory, "planned_bytes", lambda *args: 10 * gib)
    with pytest.raises(ConfigError, match="a step takes 10.0GiB by its plan, .*MiB of it for .* but cpu has 9.0GiB"):
        check_device_memory(config, Layout(), RankMemory(CPU, 9 * gib))
    check_device_memory(config, Layout(), RankMemory(CPU, 10.5 * gib))
    tight = tight_memory(config, Layout(), RankMemory(CPU, 10.5 * gib))
    assert tight == "a step takes 10.0GiB by its plan, more than the 92% of 10.5GiB that are safe to fill on cpu"
    assert tight_memory(config, Layout(), RankMemory(CPU, 11 * gib)) is None


def test_ranks_of_a_machine_share_its_memory_and_a_gpu_has_what_is_free_or_their_own(monkeypatch):
    assert memory_of(CPU, 4) == RankMemory(CPU, machine_memory() // 4, 4)
    assert str(RankMemory(CPU, 2**30, 4)) == "1.0GiB for each of 4 ranks"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**30)
    found = memory_of(torch.device("cuda", 1), 8)
    assert str(found) == "4.0GiB free"
    with pytest.raises(ConfigError, match=r"but cuda:1 has 4.0GiB free"):
        check_device_memory(load_recipe("debug", ["model.d_model=16Ki"]).config, Layout(), found)


def test_a_plan_for_this_machine_counts_on_no_code_that_it_cannot_run(monkeypatch):
    config, cuda = load_recipe("debug").config, torch.device("cuda")
    monkeypatch.setattr(device_memory, "unsupported_reason", lambda code, device: f"no {code}")
    assert run_here(config, cuda).train.backend == run_here(config, CPU).train.backend == "torch"
    attention = load_recipe("debug", ["model.mixers.hope.kind=attention"]).config
    assert (run_here(attention, cuda).train.backend, run_here(attention, CPU)) == ("torch", attention)
    monkeypatch.setattr(device_memory, "unsupported_reason", lambda code, device: None)
    assert run_here(config, cuda) == run_here(config, CPU) == config


def test_a_model_too_large_for_one_rank_may_fit_on_many():
    config = load_recipe("debug", ["model.d_model=4096", "model.num_layers=1000"]).config
    with pytest.raises(ConfigError):
        check_device_memory(config, Layout(dp=64), OF_CPU)
    with pytest.raises(ConfigError, match="on each of 16 ranks"):
        check_device_memory(config, Layout(tp=4, pp=4), OF_CPU)
    check_device_memory(config, Layout(tp=64, pp=100), OF_CPU)


@pytest.mark.parametrize(("zero", "each"), [(0, 18), (1, 6 + 12 / 8), (2, 2 + 16 / 8), (3, 18 / 8)])
def test_what_zero_shards_counts_once_over_all_replicas(zero: int, each: float):
    # Of attention only the norms stay float32.
    overrides = ["model.d_model=1M", "model.vocab_size=1M", "train.precision=bf16", f"parallel.zero={zero}"]
    overrides.append("model.mixers.hope.kind=attention")
    config = load_recipe("debug", overrides).config
    need = count_params(config.model)["total"] * each / 2**40
    with pytest.raises(ConfigError, match=f"take {need:.1f}TiB on each of 8 ranks"):
        check_device_memory(config, Layout(dp=8), OF_CPU)


def test_a_failed_allocation_names_the_sizes_that_decide_it():
    config = load_recipe("debug").config
    config = replace(config, train=replace(config.train, seq_len=77))
    auto = replace(config, train=replace(config.train, micro_batch_size="auto"))
    with pytest.raises(ConfigError, match="=auto, one or more sequences of") as caught, memory_errors_explained(auto):
        torch.empty(2**60)
    assert "set train.micro_batch_size=1 first" in caught.value.hint
    with pytest.raises(ConfigError, match="train.seq_len=77"), memory_errors_explained(config):
        torch.empty(2**60)
    with pytest.raises(RuntimeError, match="size"), memory_errors_explained(config):
        torch.ones(2) @ torch.ones(3)
