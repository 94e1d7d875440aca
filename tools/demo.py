"""The main job on real text: prepare, train a Hope, stop, resume bit-equal, train a Transformer beside it, write."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

STOP, CHECKED = 10, 20
"""Step at which the run is stopped and resumed, and step up to which an uninterrupted twin is compared with it."""


def main() -> None:
    """Run the demo in the folder named on the command line."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: {Path(sys.argv[0]).name} FOLDER")
    folder, begin = Path(sys.argv[1]), time.monotonic()
    if folder.exists():
        sys.exit(f"{folder} exists; remove it to run the demo again (make clean removes .venv too)")
    prepare(folder)
    hope, twin, transformer = folder / "hope", folder / "twin", folder / "transformer"

    say("Train a Hope with three levels; stop it early, continue it with the same command")
    train("demo", hope, "--stop-at", str(STOP))
    train("demo", hope)

    say(f"The same run without a stop, up to step {CHECKED}: what both recorded must be equal bit for bit")
    train("demo", twin, "--stop-at", str(CHECKED))
    run(sys.executable, Path(__file__).parent / "loss_compare.py", hope, twin, "--after", str(STOP))

    say("A Transformer with as many parameters, on the same tokens")
    train("demo_transformer", transformer)

    say("Let the Hope write")
    hopescale("generate", hope, "--prompt", "def ", "--max-tokens", "120", "--temperature", "0.7", "--top-k", "40")
    summarise(hope, transformer)
    print(f"\ntook {time.monotonic() - begin:.0f} s; curves: {bin_folder() / 'tensorboard'} --logdir {folder}")


def prepare(folder: Path) -> None:
    """Make the demo's text, tokenizer and shards."""
    say("Prepare text that every machine has: the sources and help pages of Python's standard library")
    run(sys.executable, Path(__file__).parent / "stdlib_corpus.py", folder / "corpus.jsonl")
    hopescale("data", "tokenizer", folder / "corpus.jsonl", "--vocab-size", "4096", "--out", folder / "tokenizer")
    sources = ("--tokenizer", folder / "tokenizer", "--out", folder / "data", "--validation", "0.03")
    hopescale("data", "prepare", folder / "corpus.jsonl", *sources)


def train(recipe: str, run_dir: Path, *options: str) -> None:
    """Train a shipped recipe on the demo's shards."""
    hopescale("train", recipe, f"data.sources.main.path={run_dir.parent / 'data'}", "--run-dir", run_dir, *options)


def summarise(hope: Path, transformer: Path) -> None:
    """Print first and last validation loss of both runs, and say which is lower."""
    say("Validation loss, nats per token")
    last = {}
    for name, run_dir in (("hope", hope), ("transformer", transformer)):
        losses = [record["val/main/loss"] for record in records(run_dir) if "val/main/loss" in record]
        last[name] = losses[-1]
        print(f"{name:12} first {losses[0]:.4f}  last {losses[-1]:.4f}  lower by {losses[0] - losses[-1]:.4f}")
    margin = last["transformer"] - last["hope"]
    print(f"the Hope's is {abs(margin):.4f} nats {'below' if margin > 0 else 'above'} the Transformer's")


def records(run_dir: Path) -> list[dict[str, float]]:
    """Read a run's metrics."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def bin_folder() -> Path:
    """Return the folder of this Python's commands, as a reader would type it."""
    folder = Path(sys.executable).parent
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def hopescale(*arguments: str | Path) -> None:
    """Run a verb of the command line."""
    run(bin_folder() / "hopescale", *arguments)


def run(*command: str | Path) -> None:
    """Show a command, run it, stop if it fails."""
    words = [str(word) for word in command]
    print(f"\n$ {shlex.join(words)}", flush=True)
    if code := subprocess.run(words, check=False).returncode:
        sys.exit(code)


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    main()
