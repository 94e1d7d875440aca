"""Tables of the pages that come from plans and from counts in `cost`; `tools/write_reference.py` writes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import product

from hopescale.common.paths import shipped_folder
from hopescale.config.layout import Layout, make_layout
from hopescale.config.load import load_recipe
from hopescale.config.schema import RunConfig
from hopescale.cost.estimate import Estimator
from hopescale.cost.hardware import DEVICES, trained_on
from hopescale.cost.holdings import Holdings
from hopescale.cost.pace import memory_pace
from hopescale.cost.roofline import INSTRUCTIONS, memory_seconds
from hopescale.cost.search import fullest

GPUS = re.compile(r", on (eight|[0-9,]+) 80-GB GPUs\.$")
LENGTHS = (4096, 16384, 32768)
REPLAYED = 3 / 4
"""Part of a sequence's chunks that the backward runs forward once more."""


def gpus_of(recipe: str) -> int | None:
    """Return the number of GPUs that the first line of a shipped recipe names, if any."""
    first = (shipped_folder("recipes") / f"{recipe}.yaml").read_text().partition("\n")[0]
    named = GPUS.search(first)
    return int(named[1].replace("eight", "8").replace(",", "")) if named else None


def recipes() -> Iterator[str]:
    """Yield what is planned of each recipe on the GPUs that it names."""
    h100 = DEVICES["H100"]
    yield "| recipe | GPUs | micro batch | recompute | GiB of a GPU | heads side by side | tokens/s |"
    yield "|---|---|---|---|---|---|---|"
    for name in sorted(path.stem for path in shipped_folder("recipes").glob("*.yaml")):
        if (count := gpus_of(name)) is None:
            continue
        config = trained_on(load_recipe(name).config, "H100")
        layout, holdings, train = make_layout(config, count), Holdings(config), config.train
        peak = fullest(holdings, config, layout, exact=True) / 2**30
        paces = memory_pace(config, layout, h100).values()
        programs = ", ".join(f"{each['programs']} in {each['waves']} x {each['at_once']}" for each in paces)
        speed = Estimator(holdings, h100).step(config, layout).tps
        cells = (f"`{name}`", f"{count:,}", train.micro_batch_size, f"`{train.recompute}`", f"{peak:.1f}", programs)
        yield f"| {' | '.join(map(str, cells))} | {speed:,.0f} |"


def beside(memory: str, recompute: str, seq_len: int) -> RunConfig:
    """Return the Hope whose block is compared with a Transformer's: 8 sequences, width 2,048, heads of 64."""
    shape = ("model.num_heads=32", f"model.mixers.hope.memory={memory}", "train.micro_batch_size=8")
    settings = [*shape, f"train.recompute={recompute}", f"train.seq_len={seq_len}"]
    return trained_on(load_recipe("hope_1.3b", settings).config, "H200")


def ratios() -> Iterator[str]:
    """Yield how fast a block of Hope is planned beside that of the equal Transformer, on an H200."""
    yield "| memories | recompute | memories, ms | block, ms | Transformer's, ms | 4,096 | 16,384 | 32,768 |"
    yield "|---|---|---|---|---|---|---|---|"
    device = DEVICES["H200"]
    for memory, recompute in product(("mlp", "linear"), ("none", "block")):
        found, times = [], ""
        for seq_len in LENGTHS:
            config, layout = beside(memory, recompute, seq_len), Layout()
            estimator, mixer = Estimator(Holdings(config), device), config.model.mixers["hope"]
            again = recompute == "block"
            memories = memory_seconds(config, layout, mixer, memory, device, again=again)
            own, other = estimator.mean_block_s(config, layout), estimator.transformer_block_s(config, layout)
            times = times or " | ".join(f"{1e3 * seconds:.1f}" for seconds in (memories, own, other))
            found.append(f"{other / own:.3f}")
        yield f"| {_NAMES[memory]} | `{recompute}` | {times} | {' | '.join(found)} |"


def instructions() -> Iterator[str]:
    """Yield the instructions of a chunk by which memories are planned."""
    yield "| `D` | memories | products | warps | forward | backward |"
    yield "|---|---|---|---|---|---|"
    order = sorted(INSTRUCTIONS.items(), key=lambda item: (item[0][2], item[0][1], item[0][0]))
    for (products, memory, dim), counted in order:
        counts = f"{counted.warps} | {counted.forward:,} | {counted.backward:,}"
        yield f"| {dim} | {_NAMES[memory]} | `{products}` | {counts} |"


def gains() -> Iterator[str]:
    """Yield the instructions of a chunk before and now, of a warp and of all warps."""
    yield "| `D` | memories | pass | a warp, before | now | ratio | all warps, before | now | ratio |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for dim, memory in product((64, 128), ("linear", "mlp")):
        before, now = (INSTRUCTIONS[products, memory, dim] for products in ("tf32x3", "bf16"))
        back = before.backward - REPLAYED * before.forward
        rows = {
            "forward": (before.forward, now.forward),
            "backward": (back, now.backward - REPLAYED * now.forward),
            "backward and replay": (back, now.backward),
        }
        for name, (was, has) in rows.items():
            of_all, now_all = was * before.warps, has * now.warps
            yield (
                f"| {dim} | {_NAMES[memory]} | {name} | {was:,.0f} | {has:,.0f} | {has / was:.2f} | "
                f"{of_all / 1e3:,.0f}k | {now_all / 1e3:,.0f}k | {now_all / of_all:.2f} |"
            )


_NAMES = {"mlp": "MLP", "linear": "linear"}

TABLES: dict[str, dict[str, Callable[[], Iterator[str]]]] = {
    "performance.md": {"gains": gains, "ratios": ratios},
    "planning.md": {"recipes": recipes, "instructions": instructions},
}
"""Tables by the page of docs/ that has them, between `<!-- table: NAME -->` and `<!-- end -->`."""


def with_tables(page: str, text: str) -> str:
    """Return the text of a page with its tables written anew."""
    for name, rows in TABLES[page].items():
        lines = "\n".join(rows())
        place = re.compile(rf"(?<=<!-- table: {name} -->\n).*?(?=<!-- end -->)", re.DOTALL)
        text, count = place.subn(f"\n{lines}\n\n", text)
        assert count == 1, f"docs/{page} has {count} places for the table {name}"
    return text
