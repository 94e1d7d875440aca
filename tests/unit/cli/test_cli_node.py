from __future__ import annotations

from pathlib import Path

import pytest

from hopescale.cli.app import main
from hopescale.train.preflight import Verdict

CPU = ("train.device=cpu",)


@pytest.fixture
def hopescale(capsys, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node7")

    def call(*args: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return caught.value.code or 0, out + err

    return call


def test_staging_needs_somewhere_to_copy_to_and_leaves_synthetic_data_alone(hopescale, tmp_path: Path):
    code, out = hopescale("node", "stage", "debug")
    assert code == 2 and "data.staged is null" in out
    assert hopescale("node", "stage", "debug", f"data.staged={tmp_path}") == (0, "")
    sources = ("data.sources.markov=null", f"data.sources.text.path={tmp_path}")
    code, out = hopescale("node", "stage", "debug", *sources, f"data.staged={tmp_path}")
    assert code == 3 and f"cannot read {tmp_path}/index.json" in out


def test_a_bad_node_is_named_and_with_drain_left_out(hopescale, tmp_path: Path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    code, out = hopescale("node", "check", "debug", *CPU, "--run-dir", run, "--drain")
    assert (code, out) == (0, "check of nodes: all good: 1 node, 1 rank\n")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOCAL_DISK", str(tmp_path / "file"))
    bad = ("node", "check", "debug", *CPU, "data.staged=$LOCAL_DISK/data", "--run-dir", run)
    code, out = hopescale(*bad)
    assert code == 0 and out.startswith(f"bad node node7: {tmp_path}/file/data: ")
    assert not (run / "bad_nodes").exists()
    code, out = hopescale(*bad, "--drain")
    assert code == 75 and "bad nodes: node7" in out
    assert (run / "bad_nodes").read_text() == "node7\n"


def test_a_bad_node_is_written_down_by_a_good_one(hopescale, tmp_path: Path, monkeypatch):
    """The first node's rank 0 may be the one that cannot write to the run folder."""
    run = tmp_path / "run"
    run.mkdir()
    verdict = Verdict({"node7": "run: Stale file handle"})
    monkeypatch.setattr("hopescale.train.preflight.check_nodes", lambda *_: verdict)
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "node[7-8]", "SLURM_JOB_ID": "1"}
    for name, value in {**step, "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    for rank, node in enumerate(("node7", "node8")):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        monkeypatch.setenv("SLURMD_NODENAME", node)
        assert hopescale("node", "check", "debug", *CPU, "--run-dir", run, "--drain")[0] == 75
        assert (run / "bad_nodes").exists() == (node == "node8")
    code, out = hopescale("node", "check", "debug", *CPU, "--run-dir", tmp_path / "nothing", "--drain")
    assert code == 5 and "bad nodes (node7) cannot be written to" in out
