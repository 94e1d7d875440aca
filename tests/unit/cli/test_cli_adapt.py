"""What `adapt --nproc` refuses before it loads a model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from hopescale.checkpoint.manifest import EXPORT
from hopescale.cli import adapt
from hopescale.common.errors import ConfigError
from hopescale.config.load import load_recipe, to_dict


@pytest.mark.parametrize(
    ("recipe", "processes", "key"), [("mamba2_tiny", 2, "key_groups"), ("transformer_tiny", 3, "num_heads")]
)
def test_a_model_that_cannot_be_split_is_refused_by_name(
    recipe: str, processes: int, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / EXPORT).touch()
    manifest = SimpleNamespace(config=to_dict(load_recipe(recipe, []).config))
    monkeypatch.setattr(adapt, "read_manifest", lambda *_: manifest)
    with pytest.raises(ConfigError, match=f"{processes} processes: .*{key}"):
        adapt._require_split(tmp_path, processes)
    adapt._require_split(tmp_path, 1)
