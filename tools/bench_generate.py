"""Compare how fast recipes read prompts and generate tokens: tokens/s, ms a token by context, memory.

docs/performance.md says what is measured and how. Weights are fresh: what they are does not change what is computed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from measure import choose_clock, extra_mib, fresh_process
from rows import Row, add, show

from hopescale.common.errors import HopescaleError
from hopescale.config.check import require_valid
from hopescale.config.load import load_recipe
from hopescale.config.schema import ModelConfig
from hopescale.infer.generate import prefill
from hopescale.models import Model, ModelState


def main() -> None:
    """Measure the recipes, print the table, write JSON lines if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="ratios are to the first one")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt that is timed")
    parser.add_argument("--contexts", default="16,8192", metavar="TOKENS,...", help="tokens read before the timed ones")
    parser.add_argument("--rounds", type=int, default=5, help="prompts of each recipe, in turn; the fastest counts")
    parser.add_argument("--tokens", type=int, default=40, help="single tokens of each recipe, in turn; likewise")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--out", type=Path, help="file to which a JSON object per recipe is added")
    arguments = parser.parse_args()
    contexts = [int(word) for word in arguments.contexts.split(",")]
    try:
        models = {recipe: require_valid(load_recipe(recipe, [])).config.model for recipe in arguments.recipes}
    except HopescaleError as error:
        sys.exit(str(error))
    with fresh_process(arguments.threads) as process:
        rows = process.submit(measure, models, arguments.prompt, contexts, arguments.rounds, arguments.tokens).result()
    for row in rows:
        add(row | {"prompt": arguments.prompt, "threads": arguments.threads}, arguments.out)
    times = {f"{kind}_{context}": ".2f" for context in contexts for kind in ("ms", "state_mib")}
    show(
        rows,
        {"recipe": "", "parameters": ",", "prompt_tps": ",.0f", "prompt_ratio": ".2f", "prompt_mib": ".0f"} | times,
    )


def measure(models: dict[str, ModelConfig], prompt: int, contexts: list[int], rounds: int, tokens: int) -> list[Row]:
    """Measure models in turn; of each a row."""
    made = {recipe: Model(config, seed=0).eval() for recipe, config in models.items()}
    text = {recipe: torch.randint(config.vocab_size, (1, prompt)) for recipe, config in models.items()}
    rows = {recipe: {"recipe": Path(recipe).stem, "parameters": count(model)} for recipe, model in made.items()}
    reads = {recipe: lambda recipe=recipe: prefill(made[recipe], text[recipe]) for recipe in made}
    for recipe, (best, middle) in fastest(reads, rounds).items():
        rows[recipe] |= {"prompt_tps": prompt / best, "prompt_spread": middle / best}
        rows[recipe] |= {"prompt_mib": extra_mib(reads[recipe], torch.device("cpu"))}
    for context in contexts:
        states = {recipe: read(made[recipe], text[recipe], context) for recipe in made}
        steps = {recipe: lambda r=recipe, s=states[recipe]: prefill(made[r], text[r][:, :1], s) for recipe in made}
        for recipe, (best, middle) in fastest(steps, tokens).items():
            rows[recipe] |= {f"ms_{context}": best * 1e3, f"spread_{context}": middle / best}
            rows[recipe] |= {f"state_mib_{context}": size_mib(states[recipe])}
    first = next(iter(rows.values()))
    return [row | {"prompt_ratio": row["prompt_tps"] / first["prompt_tps"]} for row in rows.values()]


def fastest(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Time functions in turn: seconds of the fastest run of each, and of the one in the middle."""
    clock, times = choose_clock(torch.device("cpu")), {name: [] for name in runs}
    for number in range(1 + rounds):
        for name, run in runs.items():
            begin = clock()
            run()
            times[name] += [clock() - begin] * (number > 0)  # the first, slow run never counts
    return {name: (min(seen), median(seen)) for name, seen in times.items()}


def read(model: Model, text: torch.Tensor, context: int) -> ModelState:
    """Return the state after so many tokens, the text over and over."""
    return prefill(model, text.repeat(1, -(-context // text.shape[1]))[:, :context]).state


def count(model: Model) -> int:
    """Count the parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def size_mib(state: ModelState) -> float:
    """Return what a state holds in MiB, a tensor that it holds twice counted once."""
    tensors = {tensor.data_ptr(): tensor for layer in state.layers for tensor in layer.named().values()}
    return sum(tensor.nbytes for tensor in tensors.values()) / 2**20


if __name__ == "__main__":
    main()
