"""All that a plan says of one run, as a dictionary of numbers: what `hopescale plan` shows and `--json` prints."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import Any

from hopescale.config.execution import effective_recompute, run_again
from hopescale.config.layout import Layout
from hopescale.config.plan import make_plan
from hopescale.config.schema import RunConfig
from hopescale.cost.comm import SentBytes
from hopescale.cost.device_memory import device_memory_of_stage
from hopescale.cost.estimate import Estimator
from hopescale.cost.flops import flops_by_part, flops_per_token
from hopescale.cost.pace import memory_pace
from hopescale.cost.params import count_level_params, count_params
from hopescale.cost.search import USABLE, LayoutChoice, changes_that_fit, fullest, recompute_modes


def make_report(estimator: Estimator, layout: Layout) -> dict[str, Any]:
    """Return the plan of the estimator's config, which has passed its checks, and device on a layout."""
    holdings, device, config = estimator.holdings, estimator.device, estimator.holdings.config
    stages = [device_memory_of_stage(holdings, config, layout, stage) for stage in range(layout.pp)]
    room = USABLE * device.memory
    fits = max(stage.peak for stage in stages) <= room
    changes = None if fits else changes_that_fit(estimator, config, layout)
    ratio = estimator.beside_transformer(config, layout)
    return {
        "name": config.name,
        "device": {"name": device.name, "memory": device.memory, "usable": room, "peak_flops": device.peak_flops},
        "layout": _layout(config, layout),
        "parameters": {
            "by_part": count_params(config.model),
            "by_level": count_level_params(config.model),
            "per_rank": [stage.parameters for stage in stages],
        },
        "flops_per_token": _flops(config),
        "memory": {
            "fits": fits,
            "change": changes and _change(changes.smallest, config, layout),
            "fastest": changes and _change(changes.fastest, config, layout),
            "stages": [
                {"peak": stage.peak, "moment": stage.moment, "in_flight": stage.in_flight, **stage.bytes}
                for stage in stages
            ],
            "pace": memory_pace(config, layout, device),
            "by_recompute": _by_recompute(estimator, config, layout),
        },
        "bytes_per_step": [SentBytes(holdings, layout, stage).per_step() for stage in range(layout.pp)],
        "estimate": estimator.step(config, layout).numbers(),
        "beside_transformer": ratio,
        "assumptions": estimator.assumptions(compared=ratio is not None),
    }


def _change(choice: LayoutChoice, config: RunConfig, layout: Layout) -> dict[str, Any]:
    return choice.numbers() | {"settings": choice.changes(config, layout)}


def _layout(config: RunConfig, layout: Layout) -> dict[str, Any]:
    plan = make_plan(config, layout)
    return {
        "ranks": layout.num_ranks,
        **asdict(layout),
        "zero": config.parallel.stage,
        "shard": config.parallel.shard,
        "micro_batch_size": config.train.micro_batch_size,
        "micro_batches": plan.grad_accumulation,
        "recompute": config.train.recompute,
        "precision": config.train.precision,
        "tokens_per_step": config.train.global_batch_tokens,
        "steps": config.train.steps,
        "total_tokens": plan.total_tokens,
    }


def _flops(config: RunConfig) -> dict[str, Any]:
    model, seq_len = config.model, config.train.seq_len
    executed = flops_by_part(model, seq_len, recompute=partial(effective_recompute, config), again=run_again(config))
    total = flops_per_token(model, seq_len)
    parts = {
        name: {"forward": part.forward, "backward": part.backward, "executed": executed[name].total}
        for name, part in flops_by_part(model, seq_len).items()
    }
    return {
        "by_part": parts,
        "total": total,
        "executed": sum(part.total for part in executed.values()),
        "per_parameter": total / count_params(model)["total"],
    }


def _by_recompute(estimator: Estimator, config: RunConfig, layout: Layout) -> dict[str, dict[str, float]]:
    """Return the fullest rank's bytes and the tokens per second of each value of `train.recompute`."""
    modes = {}
    for how in recompute_modes(config):
        other = replace(config, train=replace(config.train, recompute=how))
        peak = fullest(estimator.holdings, other, layout, exact=True)
        modes[how] = {"peak": peak, "tps": estimator.step(other, layout).tps}
    return modes
