"""Compare whole training steps of a recipe with those of a Transformer: tokens/s, where the time goes, peak memory.

docs/performance.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

from measure import choose_clock, fresh_process
from rows import Row, add, show

from hopescale.common.errors import ConfigError, HopescaleError
from hopescale.config.check import require_valid
from hopescale.config.layout import make_layout
from hopescale.config.load import load_recipe
from hopescale.config.plan import make_plan
from hopescale.config.schema import RunConfig
from hopescale.cost.auto_batch import choose_micro_batch, with_micro_batch
from hopescale.cost.params import count_params
from hopescale.data.loader import prefetched
from hopescale.engine import Engine, make_passes
from hopescale.observe.throughput import peak_memory_gib
from hopescale.parallel.device import choose_device
from hopescale.parallel.mesh import Mesh
from hopescale.train.device_memory import memory_of, run_here
from hopescale.train.setup import build_state


class Step(NamedTuple):
    """What a step took: seconds for data, for gradients and for the update; then the highest memory so far in GiB."""

    data_s: float
    gradients_s: float
    update_s: float
    peak_gib: float

    @property
    def seconds(self) -> float:
        """All of the step."""
        return self.data_s + self.gradients_s + self.update_s


def main() -> None:
    """Measure both recipes, print the table, write JSON lines if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to both recipes")
    parser.add_argument("--against", metavar="RECIPE", help="default: transformer_SIZE for hope_SIZE")
    parser.add_argument("--steps", type=int, default=6, help="of each recipe, in turn; the fastest counts")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--out", type=Path, help="file to which a JSON object per recipe is added")
    arguments = parser.parse_args()
    overrides = (*arguments.overrides, f"train.steps={arguments.steps}", "optim.schedule.warmup_steps=0")
    try:
        recipes = [arguments.against or twin(arguments.recipe), arguments.recipe]
        configs = [require_valid(load_recipe(recipe, overrides)).config for recipe in recipes]
        found = list(measure(recipes, overrides, arguments.steps, arguments.threads))
    except HopescaleError as error:
        sys.exit(str(error))
    rows = [row_of(*parts) for parts in zip(recipes, configs, found, strict=True)]
    for row in rows:
        row |= {"tps_ratio": row["tps"] / rows[0]["tps"], "memory_ratio": row["peak_gib"] / rows[0]["peak_gib"]}
        add(row | {"threads": arguments.threads}, arguments.out)
    figures = dict.fromkeys(("data_s", "gradients_s", "update_s"), ".3f") | {"peak_gib": ".2f", "memory_ratio": ".2f"}
    show(rows, {"recipe": "", "parameters": ",", "tokens": ",", "tps": ",.0f", "tps_ratio": ".2f"} | figures)


def twin(recipe: str) -> str:
    """Name the Transformer of a shipped recipe's size: `transformer_tiny` for `hope_tiny` and `hope_attention_tiny`."""
    if not recipe.startswith("hope_"):
        raise ConfigError(f"there is no Transformer known to be of the size of {recipe}", "name one with --against")
    return "transformer_" + recipe.removeprefix("hope_").removeprefix("attention_")


def measure(recipes: list[str], overrides: tuple[str, ...], steps: int, threads: int) -> Iterator[Step]:
    """Train each recipe in a process of its own, a step of each in turn; yield the fastest step of each."""
    with ExitStack() as stack:
        processes = [stack.enter_context(fresh_process(threads)) for _ in recipes]
        runs = list(zip(processes, recipes, strict=True))
        taken = [
            [process.submit(take_step, recipe, overrides).result() for process, recipe in runs] for _ in range(steps)
        ]
    for of_recipe in zip(*taken, strict=True):
        yield min(of_recipe, key=lambda step: step.seconds)._replace(peak_gib=of_recipe[-1].peak_gib)


def take_step(recipe: str, overrides: tuple[str, ...]) -> Step:
    """Take the next step of the run that this process holds."""
    return next(steps_of(recipe, overrides))


@cache
def steps_of(recipe: str, overrides: tuple[str, ...]) -> Iterator[Step]:
    """Begin a run, once in a process; each item is a step taken."""
    return train(load_recipe(recipe, overrides).config)


def train(config: RunConfig) -> Iterator[Step]:
    """Take the steps of a run; a micro batch that is `auto` is the largest that fits."""
    device, mesh, layout = choose_device(config.train.device, "train.device"), Mesh.alone(), make_layout(config, 1)
    if config.train.micro_batch_size == "auto":
        chosen = choose_micro_batch(run_here(config, device), layout, device.type, memory_of(device).bytes)
        config = with_micro_batch(config, chosen.size)
    state = build_state(config, layout, mesh, device)
    passes = make_passes(
        state.slices, state.optimizer.backward, config.train.seq_len, device, segments=config.train.segments
    )
    engine = Engine(passes, state.optimizer, state.levels, device, cadences=state.cadences)
    micro, count = config.train.micro_batch_size, make_plan(config).global_batch_size
    indices = (range(start, start + micro) for start in range(0, config.train.steps * count, micro))
    batches = prefetched(state.data, indices, config.data.prefetch * count // micro)
    clock = choose_clock(device)
    for step in range(1, 1 + config.train.steps):
        times = [clock()]
        micro_batches = list(islice(batches, count // micro))
        times.append(clock())
        computed = engine.gradients(step, micro_batches)
        times.append(clock())
        # Through the gate, as training updates; a host that must know first would wait in `read`.
        engine.update(step, computed, limits=state.watch.limits() if engine.is_gated else None)
        times.append(clock())
        yield Step(*(end - begin for begin, end in pairwise(times)), peak_memory_gib(device))
        found = computed.read()
        if state.watch.judge(found.loss, found.grad_norm, found.waiting_norm) and engine.is_gated:
            state.optimizer.take_back(step)


def row_of(recipe: str, config: RunConfig, step: Step) -> Row:
    """Put together what is known of a recipe."""
    tokens = config.train.global_batch_tokens
    row = {"recipe": Path(recipe).stem, "parameters": count_params(config.model)["total"], "tokens": tokens}
    return row | {"tps": tokens / step.seconds} | step._asdict()


if __name__ == "__main__":
    main()
