"""A pass over a stream on tensor-parallel ranks equals one process: losses, levels, and all that is kept to go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hopescale.checkpoint.manifest import Manifest, read_manifest
from hopescale.config.layout import Layout
from hopescale.config.load import to_dict
from hopescale.config.schema import RunConfig
from hopescale.infer.adaptation import read_adaptation
from hopescale.infer.follow import StreamPass
from hopescale.infer.level_state import LEVELS, READER, WEIGHTS, put_levels, read_file, read_levels
from hopescale.infer.load import LoadedModel
from hopescale.models import Model
from hopescale.parallel.mesh import Mesh
from tests.support.models import BASE
from tests.support.ranks import run_ranks
from tests.support.split import VARIANTS

CADENCES = read_adaptation("--levels", "fast=5,slow=12", rate=0.5)
CPU = torch.device("cpu")
NAMES = {
    2: ("hope, all switches", "linear attention, within documents", "titans, within documents"),
    4: ("hope, all switches", "grouped-query attention"),
}
STOPPED_AFTER = 20


class Stopped(Exception):
    """Stands for the end of a process."""


def make_pass(name: str, mesh: Mesh) -> StreamPass:
    config = replace(RunConfig(), model=replace(BASE, **VARIANTS[name]))
    config = replace(config, train=replace(config.train, seq_len=9))
    manifest = Manifest({"step": 3}, to_dict(config), {})
    loaded = LoadedModel(Model(config.model, seed=3, mesh=mesh).double().eval(), None, config, manifest, Path("run"))
    generator = np.random.default_rng(0)
    documents = [generator.integers(200, size=size) for size in (31, 14)]
    return StreamPass(loaded, CADENCES, documents, parts=3, probe_tokens=7)


def figures(stream: StreamPass) -> list[float]:
    return [*stream.read, *stream.trained, *(value for row in stream.after for value in row)]


def kept(folder: Path) -> dict[str, torch.Tensor]:
    manifest = read_manifest(folder, LEVELS)
    return {f"{part}/{n}": t for part in (WEIGHTS, READER) for n, t in read_file(folder, manifest, part, CPU).items()}


def stop(done: int, total: int) -> None:
    if done > STOPPED_AFTER:
        raise Stopped


def check_pass(rank: int, folder: Path, tp: int) -> None:
    mesh = Mesh.over_all(Layout(tp=tp))
    for number, name in enumerate(NAMES[tp]):
        whole, split, stopped = (folder / f"{kind}-{number}" for kind in ("whole", "split", "stopped"))
        alone, ranks = make_pass(name, Mesh.alone()), make_pass(name, mesh)
        alone.run(whole if rank == 0 else None, 10)
        ranks.run(split, 10)
        assert figures(ranks) == pytest.approx(figures(alone), rel=1e-5), name
        with pytest.raises(Stopped):
            make_pass(name, mesh).run(stopped, 10, on_read=stop)
        if rank == 0:
            check_other_number(name, alone, kept(whole), stopped, folder / f"fewer-{number}", Mesh.alone())
            with pytest.raises(Stopped):
                make_pass(name, Mesh.alone()).run(folder / f"more-{number}", 10, on_read=stop)
        mesh.control.gather(None)
        check_other_number(name, alone, kept(whole), folder / f"more-{number}", folder / f"more-{number}", mesh)
        again = make_pass(name, mesh)
        again.go_on(stopped)
        assert 10 <= again.position <= STOPPED_AFTER
        again.run(stopped, 10)
        assert again.report() == ranks.report(), name
        if rank == 0:
            check_files(name, alone, *(kept(each) for each in (whole, split, stopped)))
            # One process goes on from what ranks have kept, and another uses their levels.
            assert alone.loaded.digest == ranks.loaded.digest
            alone.go_on(split)
            put_levels(split, make_pass(name, Mesh.alone()).loaded)
            assert read_levels(split, alone.loaded).keys() == alone.reader.weights.keys()


def check_other_number(
    name: str, alone: StreamPass, whole: dict[str, torch.Tensor], stopped: Path, out: Path, mesh: Mesh
) -> None:
    """Go on, in the midst of the stream, on another number of ranks than the pass began on."""
    again = make_pass(name, mesh)
    again.go_on(stopped)
    assert 10 <= again.position <= STOPPED_AFTER
    again.run(out, 10)
    assert figures(again) == pytest.approx(figures(alone), rel=1e-5), name
    if mesh.control.is_first:
        assert_near(name, kept(out), whole)


def assert_near(name: str, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{name}, {k}: {m}")


def check_files(name: str, alone: StreamPass, *files: dict[str, torch.Tensor]) -> None:
    whole, split, again = files
    assert_near(name, split, whole)
    assert again.keys() == whole.keys() and any("state/" in key for key in whole)
    for key, tensor in split.items():
        assert torch.equal(again[key], tensor), f"{name}: {key} is another one after a stop"


@pytest.mark.parametrize("tp", NAMES)
def test_a_pass_on_ranks_equals_one_process_and_goes_on(tp: int, tmp_path: Path):
    run_ranks(check_pass, tp, tmp_path, tmp_path, tp, limit_s=300)
