"""A real Slurm cluster on this machine, one test at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

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
