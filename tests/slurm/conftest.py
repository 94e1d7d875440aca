"""A real Slurm cluster on this machine, one test at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import cluster


@pytest.fixture(scope="session")
def running() -> Iterator[cluster.Cluster]:
    """Start the cluster for this session; skip where there cannot be one."""
    if reason := cluster.missing():
        pytest.skip(reason)
    with ExitStack() as stack:
        try:
            made = stack.enter_context(cluster.running_cluster())
        except LookupError as error:
            pytest.skip(f"Slurm cannot be installed: {error}")
        yield made


@pytest.fixture
def slurm(running: cluster.Cluster) -> Iterator[cluster.Cluster]:
    """Give a test the whole cluster."""
    with cluster.exclusive():
        yield running


@pytest.fixture
def profile(tmp_path: Path) -> Callable[..., Path]:
    """Write a profile of the test cluster: two ranks a node on CPUs."""

    def write(name: str, *lines: str) -> Path:
        base = ("gpus_per_node: 0", "ranks_per_node: 2", "cpus_per_node: 2", 'time: "30"', "signal_lead_s: 50")
        keys = {line.partition(":")[0] for line in lines}
        path = tmp_path / f"{name}.yaml"
        path.write_text("\n".join([*(line for line in base if line.partition(":")[0] not in keys), *lines]) + "\n")
        return path

    return write
