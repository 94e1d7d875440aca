"""`log.samples`: what the model writes at validations, on the console and in `samples.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hopescale.observe.metrics import TextLog

if TYPE_CHECKING:
    from conftest import Run

SAMPLED = ('log.samples=["3 1 4", "5"]', "log.sample_tokens=4")
STEPS = ("train.validation.every=2", "train.validation.tokens=64", "train.steps=2")


def test_samples_are_what_generate_writes(train, run: Run, hopescale):
    done = train(*SAMPLED, *STEPS)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["name"]) for line in lines] == [
        (step, name) for step in (0, 2) for name in ("sample/0", "sample/1")
    ]
    assert all(len(line["text"].split()) == (7 if line["name"] == "sample/0" else 5) for line in lines)
    alone = hopescale("generate", run.path, "--prompt", "3 1 4", "--max-tokens", 4)
    assert alone.out.split() == lines[-2]["text"].split()
    assert f"step 2/2  sample/0  {lines[-2]['text']!r}" in done.out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("log.sample_tokens=3",), "3 has no effect: log.samples is empty"),
        (('log.samples=["3"]', "train.validation.every=null"), "train.validation.every is null"),
        (('log.samples=["3"]', "parallel.tp=2"), "but parallel.tp is 2"),
        (('log.samples=["text"]',), "log.samples is 'text', but this model was trained on synthetic symbols"),
    ],
)
def test_samples_that_cannot_be_written_are_refused(train, settings: tuple[str, ...], message: str):
    done = train(*settings, *(["--dry-run"] if "text" not in settings[0] else []))
    assert done.code == 2 and message in done.err


def test_texts_of_a_course_given_up_are_dropped(tmp_path: Path):
    path = tmp_path / "samples.jsonl"
    for resume_step, steps in ((None, (0, 2, 4)), (2, (4,))):
        log = TextLog(path, resume_step=resume_step)
        for step in steps:
            log.log(step, {"sample/0": f"{resume_step}\n"})
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["text"]) for line in found] == [(0, "None\n"), (2, "None\n"), (4, "2\n")]
