"""What would lose work in silence: a node declared failed or lost, a controller away, options of a setup."""

from __future__ import annotations

import re
import signal
from contextlib import ExitStack
from pathlib import Path

from tests.slurm.test_survival import Scene
from tests.support.cluster import TOOLS, Cluster, steps


def test_a_node_that_is_declared_failed_ends_no_run(slurm: Cluster, tmp_path: Path, profile):
    """The node works on: srun prints `Node failure` and may end with 0, which is not the word of the run."""
    scene = Scene(slurm, tmp_path, profile("declared", "ranks_per_node: 1"), "--nodes", 2, "parallel.tp=1")
    for count, which in enumerate((1, 0), 1):
        scene.halt_at_step(10 * count)
        node = slurm.hosts(scene.id)[which]
        slurm.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        slurm.restarted(scene.id, count)
        assert "the run is done" not in scene.log()
    scene.completed()
    assert scene.log().count("srun: error: Node failure on ") == 2, scene.log()


def test_a_job_waits_for_a_controller_that_is_away(slurm: Cluster, tmp_path: Path, profile):
    """Options of the setup would end the script at the failure that it has to report."""
    scene = Scene(
        slurm,
        tmp_path,
        profile("away", "ranks_per_node: 1", "setup: ['set -euo pipefail', 'trap true EXIT']"),
        "parallel.tp=1",
    )
    scene.halt_at_step(10)
    slurm.run(TOOLS / "node", "fail", "head")
    try:
        slurm.signal(scene.id, signal.SIGKILL)
        slurm.wait(lambda: scene.log().count("requeue not taken, tried again in 10 s: ") > 1, "two requeues in vain")
    finally:
        slurm.run(TOOLS / "node", "start", "head")
    slurm.restarted(scene.id, 1)
    scene.completed()
    assert "failure 1 of 3 without a newer checkpoint" in scene.log()


def test_a_lost_node_costs_the_steps_since_the_last_copy_in_memory(slurm: Cluster, tmp_path: Path, profile):
    """Each node has a memory of its own, which goes with it; nothing is on disk when the node is powered off."""
    (memory := tmp_path / "shm").mkdir()
    one = profile("memory", "ranks_per_node: 1", "sbatch: ['--exclude=node[4-8]']")
    kept = ("checkpoint.every=1000", "checkpoint.memory.every=4", f"checkpoint.memory.folder={memory}")
    with ExitStack() as stack:
        for node in ("node1", "node2", "node3"):
            stack.enter_context(slurm.own_disk(node, memory))
        scene = Scene(slurm, tmp_path, one, "--nodes", 2, "parallel.tp=1", *kept)
        scene.halt_at_step(21)
        reached, lost = max(steps(scene.run)), slurm.hosts(scene.id)[1]
        assert not (scene.run / "checkpoints" / "latest").exists()
        slurm.node("fail", lost)
        slurm.restarted(scene.id, 1)
        assert lost not in slurm.hosts(scene.id)
        slurm.node("start", lost)
        scene.completed()
    (resumed,) = re.findall(r"0: resumed from the memory of the nodes at step (\d+)", scene.log())
    assert reached - 4 <= int(resumed) <= reached, scene.log()
    assert list(steps(scene.run)) == list(range(1, 61))
