from __future__ import annotations

import sys
from types import ModuleType

import pytest

from hopescale.cli.app import main
from hopescale.cli.ranks import without_nproc
from hopescale.common.errors import ConfigError, DataError, StoppedEarly
from hopescale.common.rank_info import RankInfo
from hopescale.config.layout import Layout

RANK_1 = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "node[3-4]",
}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch):
    for name in (*RANK_1, *SRUN, "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def set_environ(monkeypatch: pytest.MonkeyPatch):
    return lambda environ: [monkeypatch.setenv(name, value) for name, value in environ.items()]


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch):
    """Stand in for the process that trains; note what it is handed, and raise what is put into `error`."""
    calls = []

    class Worker(ModuleType):
        error: Exception | None = None

        @staticmethod
        def train(request, *, rank_info, stop, report):
            calls.append((request, rank_info))
            report("a line")
            if module.error:
                raise module.error

    module = Worker("worker")
    module.calls = calls
    monkeypatch.setitem(sys.modules, "hopescale.train.worker", module)
    return module


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch):
    """Note what would be launched, and answer with exit code 6."""
    calls = []

    def run_local(command, nproc, **options):
        calls.append((command, nproc))
        return 6

    monkeypatch.setattr("hopescale.cli.ranks.run_local", run_local)
    return calls


def run(capsys, *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(args)
    out, err = capsys.readouterr()
    return caught.value.code or 0, out, err


def test_a_dry_run_says_which_micro_batch_fits(capsys):
    code, out, err = run(capsys, "train", "debug", "train.micro_batch_size=auto", "--dry-run")
    assert (code, err) == (0, "")
    assert "train.micro_batch_size: 8, the most of which a step fits cpu: " in out and "grad_accumulation: 1\n" in out


def test_a_dry_run_shows_the_layout(capsys, launches):
    code, out, err = run(capsys, "train", "debug", "--nproc", "4", "parallel.tp=2", "--dry-run")
    assert (code, err, launches) == (0, "", [])
    lines = dict(line.split(": ") for line in out.splitlines())
    assert [lines[name] for name in ("dp", "tp", "pp", "grad_accumulation")] == ["2", "2", "1", "1"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["data.sources.main={path: nowhere}"], 3, "nowhere"),
        (["train.device=cuda"], 2, "train.device is cuda, but"),
        (["train.seq_len=32Mi", "train.global_batch_tokens=1Gi", "train.micro_batch_size=32"], 2, "by its plan"),
        (["--resume", "must"], 4, "holds no checkpoint"),
        (["--init", "nowhere"], 4, "nowhere holds no checkpoint, as there is no such folder"),
    ],
)
def test_a_dry_run_finds_what_a_start_would(capsys, monkeypatch, tmp_path, args, code, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found, out, err = run(capsys, "train", "debug", *args, "--dry-run")
    assert found == code and "parameters/total: " in out and message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["2", "auto"])
def test_a_dry_run_leaves_a_mirror_alone(capsys, tmp_path, size):
    settings = (f"checkpoint.mirror={tmp_path / 'mirror'}", f"train.micro_batch_size={size}")
    assert run(capsys, "train", "debug", *settings, "--run-dir", str(tmp_path / "run"), "--dry-run")[0] == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dry", [["--dry-run"], []])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--nproc", "3"], "train.global_batch_tokens: 1024 is not a multiple of seq_len * micro_batch_size"),
        (["--nproc", "3", "parallel.tp=2"], "parallel: dp is what remains of 3 ranks, but pp*tp = 1*2 = 2"),
        (["parallel.tp=2"], "parallel: dp is what remains of 1 rank, but pp*tp = 1*2 = 2 does not divide 1"),
        (["--nproc", "8", "parallel.dp=2", "parallel.tp=2"], "parallel: dp*pp*tp = 2*1*2 = 4, but the job has 8 ranks"),
    ],
)
def test_what_does_not_split_starts_no_process(capsys, launches, worker, dry, args, message):
    code, out, err = run(capsys, "train", "debug", *args, *dry)
    assert (code, out, launches, worker.calls) == (2, "", [], [])
    assert err.startswith("config error (1 problem)\n  ") and message in err


def test_nproc_starts_the_same_command_without_it(capsys, launches):
    args = ["-v", "train", "debug", "--nproc", "2", "train.steps=7", "--resume=never", "--run-dir", "there"]
    assert run(capsys, *args)[0] == 6
    command = [sys.executable, "-m", "hopescale", "-v", "train", "debug", "train.steps=7", *args[6:]]
    assert launches == [(command, 2)]


def test_the_command_is_that_of_the_shell_where_none_is_given(capsys, launches, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["hopescale", "train", "--nproc=2", "debug"])
    with pytest.raises(SystemExit):
        main()
    assert launches == [([sys.executable, "-m", "hopescale", "train", "debug"], 2)]


@pytest.mark.parametrize(
    ("args", "kept"),
    [
        (["train", "a", "--nproc", "2", "b=c"], ["train", "a", "b=c"]),
        (["--nproc=2", "a", "--nproc=3"], ["a"]),
        (["a", "--nproc", "2", "--", "--nproc", "3"], ["a", "--", "--nproc", "3"]),
        (["a", "--nprocs=2"], ["a", "--nprocs=2"]),
    ],
)
def test_only_nproc_is_left_out(args, kept):
    assert without_nproc(args) == kept


@pytest.mark.parametrize("nproc", [[], ["--nproc", "1"]])
def test_one_process_trains_here(capsys, launches, worker, nproc):
    code, out, _ = run(capsys, "train", "debug", *nproc)
    assert (code, out, launches) == (0, "a line\n", [])
    request, rank_info = worker.calls[0]
    assert rank_info is None and request.layout == Layout()


@pytest.mark.parametrize(
    ("environ", "rank_info"),
    [(RANK_1, RankInfo(1, 2, 1, "node1", 29500)), (SRUN, RankInfo(1, 2, 0, "node3", 15007, bound=True))],
    ids=["torchrun", "srun"],
)
def test_a_launcher_s_process_takes_its_place_and_is_silent(capsys, worker, set_environ, environ, rank_info):
    set_environ(environ)
    assert run(capsys, "train", "debug") == (0, "", "")
    request, its_place = worker.calls[0]
    assert its_place == rank_info and request.layout == Layout(dp=2)
    assert run(capsys, "train", "debug", "--dry-run") == (0, "", "")


def test_rank_0_speaks(capsys, worker, set_environ):
    set_environ(RANK_1 | {"RANK": "0"})
    assert run(capsys, "train", "debug") == (0, "a line\n", "")
    assert "dp: 2\n" in run(capsys, "train", "debug", "--dry-run")[1]


@pytest.mark.parametrize("environ", [RANK_1, SRUN], ids=["torchrun", "srun"])
def test_nproc_under_a_launcher_is_refused(capsys, worker, set_environ, environ):
    set_environ(environ)
    code, _, err = run(capsys, "train", "debug", "--nproc", "2")
    assert (code, worker.calls) == (2, [])
    assert "[rank 1]   --nproc 2, but this is already rank 1 of 2\n" in err


def test_a_broken_environment_is_one_message(capsys, set_environ):
    set_environ(RANK_1 | {"MASTER_PORT": "no"})
    code, _, err = run(capsys, "train", "debug")
    assert code == 5 and err.startswith("launch error\n  MASTER_PORT is 'no', must be a number from 1 to 65535\n")


@pytest.mark.parametrize(
    ("rank", "error", "told"),
    [
        ("0", DataError("shard gone"), "data error\n  shard gone\n"),
        ("1", DataError("shard gone"), "[rank 1] data error\n[rank 1]   shard gone\n"),
        ("1", ConfigError("no", "yes"), "[rank 1] config error\n[rank 1]   no\n[rank 1]     hint: yes\n"),
        ("0", StoppedEarly("SIGTERM at step 3"), "stopped\n  SIGTERM at step 3\n"),
        ("1", StoppedEarly("SIGTERM at step 3"), ""),
    ],
)
def test_errors_carry_the_rank(capsys, worker, set_environ, rank, error, told):
    set_environ(RANK_1 | {"RANK": rank})
    worker.error = error
    code, _, err = run(capsys, "train", "debug")
    assert (code, err) == (error.exit_code, told)
