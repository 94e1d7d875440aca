"""`hopescale generate` on runs trained by the command line."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

SIZES = (
    "model.d_model=16",
    "model.num_layers=1",
    "model.mixers.hope.chunk_size=8",
    "model.cms.levels.fast.d_ff=16",
    "model.cms.levels.mid.d_ff=16",
    "model.cms.levels.slow.d_ff=16",
    "train.steps=4",
    "train.seq_len=16",
    "train.micro_batch_size=2",
    "train.global_batch_tokens=32",
    "train.validation.every=null",
    "optim.schedule.warmup_steps=1",
    "log.trackers=[]",
    "checkpoint.every=2",
)
GENERATE = ("--max-tokens", 12)


@pytest.fixture(scope="module")
def trained(hopescale, text_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on a person's own text."""
    run = tmp_path_factory.mktemp("generate") / "run"
    source = (f"data.sources.text.path={text_data / 'data'}", "data.sources.markov=null", "model.vocab_size=300")
    done = hopescale("train", "debug", *SIZES, *source, "--run-dir", run)
    assert done.code == 0, done.err
    return run


@pytest.fixture
def generate(hopescale, trained: Path) -> Callable:
    return partial(hopescale, "generate", trained, *GENERATE)


def test_the_prompt_is_continued(generate, hopescale, trained: Path):
    done = generate("--prompt", "the memory keeps")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("the memory keeps") and done.out.endswith("\n")
    assert len(done.out) > len("the memory keeps\n")
    assert generate("--prompt", "the memory keeps").out == done.out
    checkpoint = trained / "checkpoints" / "step-00000004"
    assert hopescale("generate", checkpoint, *GENERATE, "--prompt", "the memory keeps").out == done.out


def test_a_longer_continuation_begins_with_the_shorter(generate):
    short, long = (generate("--prompt", "a note", "--max-tokens", count).out for count in (5, 30))
    shown = short.rstrip("\n").rstrip("\N{REPLACEMENT CHARACTER}")
    assert long.startswith(shown) and len(long) > len(short)


def test_an_empty_prompt_begins_a_text(generate):
    done = generate()
    assert done.code == 0 and len(done.out) > 1


def test_a_prompt_from_standard_input(generate, monkeypatch: pytest.MonkeyPatch):
    def piped(content: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))

    piped(b"the level\r\nkeeps\r\n")
    assert generate("--prompt", "-").out == generate("--prompt", "the level\r\nkeeps\r\n").out
    piped(b"caf\xe9")
    done = generate("--prompt", "-")
    assert done.code == 3 and "standard input is not UTF-8 text (byte 0xe9 at offset 3)" in done.err


def test_a_seed_repeats_a_text(generate):
    draw = partial(generate, "--prompt", "the", "--temperature", 1.5)
    first, again, other = (draw("--seed", seed).out for seed in (7, 7, 8))
    assert first == again != other


def test_of_one_likeliest_token_the_choice_is_greedy(generate):
    greedy = generate("--prompt", "the token").out
    assert generate("--prompt", "the token", "--temperature", 2, "--top-k", 1).out == greedy
    assert generate("--prompt", "the token", "--temperature", 2, "--top-p", 1e-9).out == greedy


@pytest.mark.parametrize("option", [("--top-k", 5), ("--top-p", 0.9)])
def test_choosing_among_several_needs_a_temperature(generate, option):
    done = generate("--prompt", "the", *option)
    assert (done.code, done.out) == (2, "")
    assert "no effect at --temperature 0" in done.err and "hint: set --temperature" in done.err


@pytest.mark.parametrize(
    "options",
    [("--temperature", -1), ("--temperature", 1, "--top-p", 2), ("--max-tokens", -1), ("--device", "gpu")],
)
def test_options_out_of_range_exit_2(generate, options):
    done = generate("--prompt", "the", *options)
    assert (done.code, done.out) == (2, "") and options[-2] in done.err


def test_a_folder_without_checkpoint(hopescale, tmp_path: Path):
    for path in (tmp_path, tmp_path / "nowhere"):
        done = hopescale("generate", path, "--prompt", "the")
        assert (done.code, done.out) == (4, "") and str(path) in done.err and "hint: " in done.err


def test_a_run_without_checkpoint_yet(hopescale, trained: Path, tmp_path: Path):
    run = shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    done = hopescale("generate", run, "--prompt", "the")
    assert done.code == 4 and f"{run} holds no checkpoint" in done.err


def test_a_corrupt_checkpoint(hopescale, trained: Path, tmp_path: Path):
    run = shutil.copytree(trained, tmp_path / "run")
    file = run / "checkpoints" / "step-00000004" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    done = hopescale("generate", run, "--prompt", "the")
    assert (done.code, done.out) == (4, "")
    assert "step-00000004 is damaged: __0_0.distcp" in done.err and "step-00000002" in done.err
    assert hopescale("generate", run / "checkpoints" / "step-00000002", *GENERATE, "--prompt", "the").code == 0


def test_a_truncated_checkpoint_named_by_its_folder(hopescale, trained: Path, tmp_path: Path):
    folder = shutil.copytree(trained, tmp_path / "run") / "checkpoints" / "step-00000004"
    os.truncate(folder / "__0_0.distcp", 100)
    done = hopescale("generate", folder, "--prompt", "the")
    assert done.code == 4 and "has 100 bytes, the manifest says" in done.err
    assert "complete ones" in done.err and "step-00000002" in done.err


def test_a_corrupt_tokenizer(hopescale, trained: Path, tmp_path: Path):
    run = shutil.copytree(trained, tmp_path / "run")
    file = run / "checkpoints" / "step-00000004" / "tokenizer.model"
    file.write_bytes(file.read_bytes()[::-1])
    done = hopescale("generate", run, "--prompt", "the")
    assert done.code == 4 and "tokenizer.model has other content" in done.err


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def symbols(hopescale, request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on synthetic data, which has no tokenizer."""
    run = tmp_path_factory.mktemp("symbols") / request.param
    sizes = ("model.vocab_size=32", "data.sources.markov.synthetic.num_symbols=12", f"train.precision={request.param}")
    assert hopescale("train", "debug", *SIZES, *sizes, "--run-dir", run).code == 0
    return run


def test_a_model_of_symbols_is_prompted_with_numbers(hopescale, symbols: Path):
    done = hopescale("generate", symbols, "--prompt", "3 4", *GENERATE)
    assert done.code == 0
    numbers = [int(word) for word in done.out.split()]
    assert len(numbers) == 14 and numbers[:2] == [3, 4] and all(0 <= number < 32 for number in numbers)


def test_a_state_continues_as_if_nothing_had_come_between(hopescale, trained: Path, tmp_path: Path):
    generate = partial(hopescale, "generate", trained)
    one_go = [generate("--prompt", "the memory keeps", "--max-tokens", count).out for count in range(1, 13)]
    # Half of a character of several tokens is shown as a mark, on both sides of a cut through it.
    texts = [text.removesuffix("\n") for text in one_go]
    cut = next(
        n
        for n, text in enumerate(texts[:11], 1)
        if n > 3 and text[-1] != "\N{REPLACEMENT CHARACTER}" and text in texts[-1]
    )
    read = generate("--prompt", "the memory keeps", "--max-tokens", 0, "--save-state", tmp_path / "read")
    assert (read.code, read.out) == (0, "the memory keeps\n"), read.err
    first = generate("--load-state", tmp_path / "read", "--max-tokens", cut, "--save-state", tmp_path / "first")
    rest = generate("--load-state", tmp_path / "first", "--max-tokens", 12 - cut)
    assert (first.code, rest.code) == (0, 0), first.err + rest.err
    assert read.out[:-1] + first.out[:-1] + rest.out == one_go[-1]
    other = generate("--load-state", tmp_path / "first", "--prompt", " level", "--max-tokens", 7)
    assert other.code == 0 and other.out.startswith(" level") and other.out != " level" + rest.out


def test_states_are_refused_with_one_message(hopescale, trained: Path, tmp_path: Path):
    state = tmp_path / "state"
    generate = partial(hopescale, "generate", trained, "--max-tokens", 2)
    assert generate("--save-state", state).code == 0
    again = generate("--load-state", state, "--save-state", state)
    assert (again.code, again.out) == (4, "") and f"output {state} already exists" in again.err
    earlier = trained / "checkpoints" / "step-00000002"
    other = hopescale("generate", earlier, "--load-state", state, "--save-state", tmp_path / "second")
    assert (other.code, other.out) == (4, "") and "step 4 of" in other.err and str(earlier) in other.err
    nothing = generate("--load-state", tmp_path / "nowhere")
    assert nothing.code == 4 and "nowhere is no state" in nothing.err and "hint: " in nothing.err
    idle = generate("--max-tokens", 0)
    assert idle.code == 2 and "no effect without --save-state" in idle.err
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_state_of_symbols(hopescale, symbols: Path, tmp_path: Path):
    generate = partial(hopescale, "generate", symbols)
    whole = generate("--prompt", "3 4", "--max-tokens", 9).out
    first = generate("--prompt", "3 4", "--max-tokens", 4, "--save-state", tmp_path / "state").out
    assert first[:-1] + generate("--load-state", tmp_path / "state", "--max-tokens", 5).out == whole


def test_text_for_a_model_of_symbols_is_refused(hopescale, symbols: Path):
    done = hopescale("generate", symbols, "--prompt", "hello")
    assert (done.code, done.out) == (2, "") and "0 to 31" in done.err
