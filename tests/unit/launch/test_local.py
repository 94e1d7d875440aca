from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest

from hopescale.common.children import Child
from hopescale.common.errors import LaunchError
from hopescale.launch.local import _outcome, run_local

HEAD = """
import os, signal, sys, time
rank = int(os.environ["RANK"])

def ready():
    open(f"ready{rank}", "w")

def wait_for(*ranks):
    while not all(os.path.exists(f"ready{rank}") for rank in ranks):
        time.sleep(0.01)
"""


class Job:
    """A run of Python code on ranks in the working directory, and what was said about it."""

    def __init__(self, code: str, nproc: int = 2, grace_s: float = 20):
        self.reports: list[str] = []
        self.relayed: list[str] = []
        self.code = run_local(
            [sys.executable, "-c", HEAD + textwrap.dedent(code)],
            nproc,
            environ=os.environ,
            report=self.reports.append,
            relay=self.relayed.append,
            grace_s=grace_s,
        )


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("code", [0, 6, 75])
def test_a_code_of_all_ranks_is_the_job_s(code):
    job = Job(f"ready(); wait_for(0, 1, 2); sys.exit({code})", 3)
    assert (job.code, job.reports, job.relayed) == (code, [], [])


def test_files_of_the_working_directory_shadow_no_module(folder: Path):
    (folder / "queue.py").write_text("raise SystemExit('shadowed')")
    (folder / "hopescale").mkdir()
    (folder / "hopescale" / "__init__.py").write_text("raise SystemExit('shadowed')")
    job = Job("import queue, hopescale")
    assert (job.code, job.reports, job.relayed) == (0, [], [])


def test_each_rank_finds_its_place(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "OMP_NUM_THREADS", "MASTER_PORT")
    assert Job(f"open(str(rank), 'w').write(' '.join(os.environ[name] for name in {names}))", 3).code == 0
    places = [(folder / str(rank)).read_text().split() for rank in range(3)]
    assert [place[:4] for place in places] == [[str(rank), "3", str(rank), "127.0.0.1"] for rank in range(3)]
    assert len({tuple(place[4:]) for place in places}) == 1
    assert int(places[0][4]) == max(1, len(os.sched_getaffinity(0)) // 3)


def test_rank_0_can_listen_on_the_port_and_nobody_else_is_given_it():
    code = """
    import socket
    address = ("127.0.0.1", int(os.environ["MASTER_PORT"]))
    if rank == 0:
        server = socket.socket()
        try:
            server.bind(address)
        except OSError:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("", address[1]))
            server.listen()
            ready()
            server.accept()
    else:
        wait_for(0)
        socket.create_connection(address)
    """
    assert Job(code).code == 0


def test_a_killed_rank_ends_the_job():
    """The other ranks sleep, and do not hear SIGTERM."""
    code = """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready()
    wait_for(0, 1, 2)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
    """
    job = Job(code, 3, grace_s=0.5)
    assert job.code == 137
    dead, term, kill = job.reports
    assert dead.startswith("rank 2 (pid ") and dead.endswith(") died with SIGKILL; stopping the others")
    assert term.startswith("still running after rank 2 (pid ")
    assert term.endswith(" died with SIGKILL: rank 0, 1; sending SIGTERM")
    assert kill.endswith(": rank 0, 1; sending SIGKILL")


def test_the_others_may_end_themselves():
    job = Job("ready(); wait_for(0, 1); sys.exit(3) if rank else time.sleep(0.5)")
    assert (job.code, job.reports) == (3, [])


def test_what_a_rank_says_when_it_is_stopped_does_not_count():
    code = """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    ready()
    wait_for(0, 1)
    sys.exit(1) if rank else time.sleep(60)
    """
    job = Job(code, grace_s=0.5)
    assert job.code == 1
    assert job.reports[0].endswith(") ended with exit code 1; stopping the others")
    assert job.reports[1].endswith(": rank 0; sending SIGTERM")


@pytest.mark.parametrize("code", [0, 75])
def test_a_rank_that_ends_in_order_does_not_stop_the_others(code, folder: Path):
    """They may be writing a checkpoint."""
    job = Job(f"if rank == 0:\n time.sleep(1)\n ready()\nsys.exit({code})", grace_s=0.1)
    assert job.code == code and (folder / "ready0").exists()


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ([(0, 1.0), (0, 5.0)], 0),
        ([(1, 9.0), (3, 1.0)], 3),
        ([(3, 9.0), (1, 1.0)], 1),
        ([(1, 1.0), (6, 2.9)], 6),
        ([(-9, 1.0), (6, 2.9)], 6),
        ([(-9, 1.0), (6, 3.1)], 137),
        ([(-9, 1.0), (1, 1.0)], 137),
        ([(4, 2.0), (3, 1.0)], 3),
        ([(75, 1.0), (4, 2.0)], 4),
        ([(75, 1.0), (4, 9.0)], 4),
        ([(75, 1.0), (-11, 2.0)], 75),
        ([(75, 1.0), (-11, 9.0)], 139),
        ([(0, 1.0), (75, 2.0)], 75),
        ([(0, 1.0), (-15, 2.0)], 143),
    ],
)
def test_the_code_of_the_job(ends, code):
    ended = [(SimpleNamespace(returncode=own), at) for own, at in ends]
    children = [Child(f"rank {rank}", *one) for rank, one in enumerate(ended)]
    assert _outcome(children) == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_signals_are_passed_on_once(number, folder: Path):
    code = f"""
    seen = []
    signal.signal({int(number)}, lambda *_: seen.append(1))
    ready()
    while not seen:
        time.sleep(0.01)
    time.sleep(0.5)
    sys.exit(75 if len(seen) == 1 else 1)
    """
    before = signal.getsignal(number)
    Thread(target=signal_this, args=(folder, number)).start()
    assert Job(code).code == 75
    assert signal.getsignal(number) is before


def signal_this(folder: Path, *numbers: int) -> None:
    wait_until(lambda: all((folder / f"ready{rank}").exists() for rank in range(2)))
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.3)


def test_an_interrupt_at_a_terminal_reaches_each_rank_once(folder: Path):
    """It goes to the whole process group of the launcher."""
    child = f"""{HEAD}
seen = []
signal.signal(signal.SIGINT, lambda *_: seen.append(1))
ready()
while not seen:
    time.sleep(0.01)
time.sleep(0.5)
sys.exit(75 if len(seen) == 1 else 1)
"""
    launcher = start_launcher(child)
    wait_until(lambda: all((folder / f"ready{rank}").exists() for rank in range(2)))
    os.killpg(launcher.pid, signal.SIGINT)
    assert launcher.wait(60) == 75


def start_launcher(child: str) -> subprocess.Popen:
    """Launch two ranks that run a piece of code, from a process that leads its own process group."""
    code = (
        "import os, sys; from hopescale.launch.local import run_local; "
        f"sys.exit(run_local([sys.executable, '-c', {child!r}], 2, environ=os.environ, report=print, relay=print))"
    )
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    return subprocess.Popen([sys.executable, "-c", code], env=environ, start_new_session=True)


def test_a_second_interrupt_ends_ranks_that_do_not_listen(folder: Path):
    code = """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready()
    time.sleep(60)
    """
    Thread(target=signal_this, args=(folder, signal.SIGINT, signal.SIGINT)).start()
    job = Job(code, grace_s=0.5)
    assert job.code == 130
    assert job.reports[0] == "still running after the second interrupt: rank 0, 1; sending SIGTERM"


def test_tracebacks_carry_the_rank(capfd):
    job = Job("if rank == 1: raise ValueError('gone')\nprint('a line of rank 0', file=sys.stderr)")
    assert job.code == 1
    assert job.relayed[0] == "[rank 1] Traceback (most recent call last):"
    assert job.relayed[-1] == "[rank 1] ValueError: gone"
    assert capfd.readouterr().err == "a line of rank 0\n"


def test_all_of_standard_error_is_passed_on():
    """Also a last line without an end, bytes that are no text, and lines that carry the rank already."""
    code = """
    if rank == 1:
        sys.stderr.write("".join(f"line {number}\\n" for number in range(20000)))
        sys.stderr.write("[rank 1] known\\n[rank1]: from torch\\n")
        sys.stderr.flush()
        os.write(2, b"\\xff no end")
    """
    (*lines, known, torch, last) = Job(code).relayed
    assert lines == [f"[rank 1] line {number}" for number in range(20000)]
    assert (known, torch, last) == (
        "[rank 1] known",
        "[rank1]: from torch",
        "[rank 1] \N{REPLACEMENT CHARACTER} no end",
    )


def test_what_a_rank_said_last_is_passed_on_before_the_job_ends():
    relayed = []

    def slow(line: str) -> None:
        time.sleep(0.2)
        relayed.append(line)

    command = [sys.executable, "-c", "import sys; sys.stderr.write('a\\nb\\n')"]
    assert run_local(command, 2, environ=os.environ, report=print, relay=slow) == 0
    assert relayed == ["[rank 1] a", "[rank 1] b"]


def test_a_listener_that_is_gone_does_not_hold_up_a_rank():
    def broken(line: str) -> None:
        raise BrokenPipeError

    code = "import os, sys; os.environ['RANK'] == '1' and (sys.stderr.write('x\\n' * 100_000), sys.exit(9))"
    assert run_local([sys.executable, "-c", code], 2, environ=os.environ, report=broken, relay=broken) == 9


def test_standard_output_is_shared(capfd):
    assert Job("print(f'rank {rank}', flush=True)").code == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["rank 0", "rank 1"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_ranks_do_not_outlive_a_killed_launcher(folder: Path):
    launcher = start_launcher(f"{HEAD}\nopen(str(rank), 'w').write(str(os.getpid())); time.sleep(60)")
    files = [folder / str(rank) for rank in range(2)]
    wait_until(lambda: all(file.exists() and file.read_text() for file in files))
    launcher.kill()
    launcher.wait()
    pids = [int(file.read_text()) for file in files]
    wait_until(lambda: not any(map(runs, pids)))


def runs(pid: int) -> bool:
    """Tell whether a process is there, and is no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_command_that_is_not_there():
    with pytest.raises(LaunchError, match="cannot start rank 0, /no/such/program: No such file"):
        run_local(["/no/such/program"], 2, environ={}, report=print, relay=print)
