"""Several processes started by one command, as a person starts them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from hopescale.launch.snapshot import take_snapshot

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID")


@pytest.fixture
def command(tiny, tmp_path: Path) -> list[str]:
    run = ("--run-dir", str(tmp_path / "run"))
    return [sys.executable, "-m", "hopescale", "train", "debug", "--nproc", "2", *tiny, *run]


@pytest.fixture
def options(tmp_path: Path) -> dict:
    environ = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [environ.get("PYTHONPATH")])])
    return {"text": True, "cwd": tmp_path, "env": {**environ, "PYTHONPATH": path}}


def finish(command: list[str], options: dict, *args: str) -> tuple[int, str, str]:
    done = subprocess.run([*command, *args], capture_output=True, timeout=200, check=False, **options)
    return done.returncode, done.stdout, done.stderr


def test_what_does_not_split_touches_nothing(command, options, tmp_path: Path):
    code, out, err = finish(command, options, "parallel.tp=2", "train.micro_batch_size=8")
    assert (code, out) == (2, "")
    assert "64 is not a multiple of seq_len * micro_batch_size = 16 * 8 = 128" in err
    code, out, err = finish(command, options, "train.micro_batch_size=4")
    assert (code, out) == (2, "")
    assert "64 is not a multiple of seq_len * micro_batch_size * parallel.dp = 16 * 4 * 2 = 128" in err
    assert not list(tmp_path.iterdir())


def test_a_failure_of_all_ranks_is_told_once_and_the_code_is_theirs(command, options):
    source = ("data.sources.markov=null", "data.sources.main.path=nowhere")
    code, out, err = finish(command, options, *source)
    assert (code, out) == (3, "")
    assert err.count("data error") == 1 and "[rank 1] data error" not in err
    assert "Traceback" not in err


def start(command: list[str], options: dict) -> subprocess.Popen:
    """Start a long run and wait until it trains."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    launcher = subprocess.Popen([*command, "train.steps=20000"], **pipes, **options)
    while "step 3/" not in (line := launcher.stdout.readline()):
        assert line, launcher.stderr.read()
    return launcher


def children(launcher: subprocess.Popen) -> list[int]:
    return [int(word) for word in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, 137), (signal.SIGSEGV, 139)])
def test_a_rank_that_dies_ends_the_job(command, options, number: signal.Signals, code: int):
    launcher = start(command, options)
    try:
        os.kill(children(launcher)[1], number)
        _, err = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
    assert launcher.returncode == code
    assert "rank 1 (pid" in err and f"died with {number.name}" in err
    if number == signal.SIGSEGV:
        assert "[rank 1] Fatal Python error: Segmentation fault" in err and "trainer.py" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_two_ranks_train_and_stop_on_a_signal_to_the_launcher(command, options, number: signal.Signals):
    launcher = start(command, options)
    try:
        launcher.send_signal(number)
        out, err = launcher.communicate(timeout=100)
    finally:
        launcher.kill()
    assert launcher.returncode == 75
    assert err.count(f"stopped\n  {number.name} at step ") == 1 and "[rank 1]" not in err


def ranks_of(folders: tuple[str, str], further: tuple[list[str], list[str]], tiny, *options: dict):
    """Start two ranks by hand, each with a command of its own; return code, output and errors of each."""
    with closing(socket.socket()) as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    both = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = []
    for rank, (folder, more) in enumerate(zip(folders, further, strict=True)):
        words, own = [sys.executable, "-m", "hopescale", "train", "debug", *tiny, "--run-dir", folder], options[-rank]
        environ = {**own["env"], **both, "RANK": str(rank), "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        ranks.append(subprocess.Popen([*words, *more], **pipes, **(own | {"env": environ})))
    said = [rank.communicate(timeout=200) for rank in ranks]
    return [(rank.returncode, *texts) for rank, texts in zip(ranks, said, strict=True)]


def test_ranks_of_different_runs_do_not_train_together(tiny, options, tmp_path: Path):
    changed = ([], ["optim.lr=3e-2", "train.seed=5"])
    for code, out, err in ranks_of(("a", "b"), changed, tiny, options):
        assert (code, out) == (5, "")
        assert f"the run folder is '{tmp_path / 'a'}' on rank 0, '{tmp_path / 'b'}' on rank 1" in err
    for code, _, err in ranks_of(("a", "a"), changed, tiny, options):
        assert code == 5 and "optim.lr is '0.003' on rank 0, '0.03' on rank 1" in err
    for code, _, err in ranks_of(("a", "a"), ([], ["--stop-at", "1"]), tiny, options):
        assert code == 5 and "--stop-at is 'None' on rank 0, '1' on rank 1" in err
    assert not list(tmp_path.iterdir())


def test_old_code_on_another_node_does_not_train(tiny, options, tmp_path: Path):
    old = tmp_path / "old"
    take_snapshot(old)
    module = old / "hopescale" / "__init__.py"
    module.write_text(module.read_text() + "\n")
    starts = []
    for path in (options["env"]["PYTHONPATH"], str(old)):
        starts.append(options | {"env": options["env"] | {"PYTHONPATH": path}})
    for code, _, err in ranks_of(("a", "a"), ([], []), tiny, *starts):
        assert code == 5 and "the code revision is '" in err
