"""Compare what two runs recorded, bit for bit: a resume with an uninterrupted run, or a refactoring with its parent."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

NUMBERS = ("loss", "grad_norm")


def main() -> None:
    """Compare the runs named on the command line at the steps that both recorded; exit 1 if a number differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN_DIR")
    parser.add_argument("--after", type=int, default=0, metavar="STEP", help="compare later steps only")
    arguments = parser.parse_args()
    first, second = (recorded(run, arguments.after) for run in arguments.runs)
    steps = sorted(first.keys() & second.keys())
    if not steps:
        sys.exit(f"no step after {arguments.after} was recorded by both {arguments.runs[0]} and {arguments.runs[1]}")
    for step in steps:
        if first[step] != second[step]:
            sys.exit(
                f"step {step} differs: {first[step]} in {arguments.runs[0]}, {second[step]} in {arguments.runs[1]}"
            )
    print(f"equal bit for bit in {' and '.join(NUMBERS)} at {len(steps)} steps, {steps[0]} to {steps[-1]}")


def recorded(run_dir: Path, after: int) -> dict[int, dict[str, float]]:
    """Read the numbers of each training step that a run has recorded after a step."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [record for line in lines if "loss" in (record := json.loads(line)) and record["step"] > after]
    return {record["step"]: {name: record[name] for name in NUMBERS} for record in records}


if __name__ == "__main__":
    main()
