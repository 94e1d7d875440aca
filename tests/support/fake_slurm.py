"""Commands of Slurm that say what a test wants: put before the real ones on the PATH."""

from __future__ import annotations

import shlex
from pathlib import Path

CONTROLLER_DOWN = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
NO_ACCOUNTING = "Slurm accounting storage is disabled"
NOT_KNOWN = "slurm_load_jobs error: Invalid job id specified"


class FakeSlurm:
    """A folder of commands. Each notes how it was called, and answers as it was last told.

    Args:
        folder: Where the commands are made; the caller puts it on the PATH.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def answer(self, command: str, out: str = "", *, error: str = "", code: int = 0) -> None:
        """Let a command print a text on standard output, another on standard error, and exit with a code."""
        path, calls = self.folder / command, self.folder / f"{command}.calls"
        lines = [f'echo "$@" >> {shlex.quote(str(calls))}']
        lines += [f"printf '%s\\n' {shlex.quote(out)}"] if out else []
        lines += [f"printf '%s\\n' {shlex.quote(error)} >&2"] if error else []
        path.write_text("\n".join(["#!/bin/sh", *lines, f"exit {code}"]) + "\n")
        path.chmod(0o755)

    def controller_down(self) -> None:
        """Let every command but those of accounting fail as without a controller."""
        self.answer("scontrol", error=CONTROLLER_DOWN, code=1)
        refused = "error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
        self.answer("sbatch", error=f"sbatch: {refused}", code=1)
        self.answer("scancel", error="scancel: error: Unable to contact slurm controller (connect failure)", code=1)

    def calls(self, command: str) -> list[str]:
        """Return the arguments of each call of a command so far."""
        path = self.folder / f"{command}.calls"
        return path.read_text().splitlines() if path.exists() else []


def record(job: str, state: str, *, array: str = "", **fields: str) -> str:
    """Return a line of `scontrol show job -o`, as Slurm 22.05 writes it.

    Args:
        job: Its number.
        state: `JobState`.
        array: Indices of the elements it stands for, as in `2-3%2`.
        fields: Other values by name.
    """
    values = {"Reason": "None", "Restarts": "0", "ExitCode": "0:0", "StartTime": "2026-11-22T04:54:24"}
    values |= {"NodeList": "node1", **fields}
    middle = f"ArrayJobId={values.pop('ArrayJobId', job)} ArrayTaskId={array} ArrayTaskThrottle=2 " if array else ""
    return (
        f"JobId={job} {middle}JobName=two words UserId=root(0) Account=root QOS=normal JobState={state} "
        f"Reason={values['Reason']} Dependency=(null) Requeue=1 Restarts={values['Restarts']} BatchFlag=1 "
        f"ExitCode={values['ExitCode']} RunTime=00:00:03 TimeLimit=UNLIMITED SubmitTime=2026-11-22T04:54:24 "
        f"StartTime={values['StartTime']} EndTime=Unknown AllocNode:Sid=localhost:8759 ReqNodeList=(null) "
        f"NodeList={values['NodeList']} NumNodes=1 CPUs/Task=1 ReqB:S:C:T=0:0:*:* Command=(null) WorkDir=/x Power= "
    )
