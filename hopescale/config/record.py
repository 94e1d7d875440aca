"""The config in a run folder: its values, their origins, and the values that follow from them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hopescale.common.disk import replace_text
from hopescale.config.layout import Layout
from hopescale.config.load import COMMAND_LINE, LoadedConfig, to_yaml
from hopescale.config.plan import make_plan
from hopescale.config.schema import RunConfig

CONFIG, PLAN = "config.yaml", "plan.json"


def write_record(
    folder: Path,
    loaded: LoadedConfig,
    layout: Layout,
    overrides: Sequence[str],
    *,
    settled: RunConfig | None = None,
) -> None:
    """Write `config.yaml`, `overrides.txt`, `origins.json` and `plan.json`.

    The plan is that of the config `settled`, in which the micro batch is a number where that of `loaded` is `auto`. A
    run that is started from its own `config.yaml` keeps the overrides and origins of the start before.
    """
    origins, overrides = loaded.origins, [f"{override}\n" for override in overrides]
    if loaded.recipe.resolve() == (folder / CONFIG).resolve() and (folder / "origins.json").exists():
        before = json.loads((folder / "origins.json").read_text(encoding="utf-8"))
        origins = {key: now if now == COMMAND_LINE else before.get(key, now) for key, now in origins.items()}
        overrides = [(folder / "overrides.txt").read_text(encoding="utf-8"), *overrides]
    files = {
        CONFIG: to_yaml(loaded.config),
        "overrides.txt": "".join(overrides),
        "origins.json": json.dumps(origins, indent=2) + "\n",
        PLAN: json.dumps(make_plan(settled or loaded.config, layout).to_dict(), indent=2) + "\n",
    }
    for name, text in files.items():
        replace_text(folder / name, text)
