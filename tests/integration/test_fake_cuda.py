"""Training steps on a CUDA device without memory: where tensors lie, what the host waits for, who sends what when.

One process stands for all ranks of a layout, one after the other, as nothing is exchanged.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from hopescale.config.layout import smallest_layout
from hopescale.config.load import load_recipe
from hopescale.cost.device_memory import device_memory_of_stage
from hopescale.cost.hardware import trained_on
from hopescale.cost.holdings import Holdings
from hopescale.cost.roofline import between_products_bytes
from tests.support.fake_cuda import device

pytestmark = pytest.mark.skipif(device.problem() is not None, reason=str(device.problem()))

SMALL = (
    "model.d_model=32",
    "model.num_heads=2",
    "model.mixers.hope.chunk_size=16",
    "train.seq_len=16",
    "train.micro_batch_size=1",
    "train.global_batch_tokens=32",
    "train.precision=bf16",
    "model.num_layers=1",
)
M3 = "optim.groups.matrices={match: ['*.gate.weight', '*.up.weight', '*.down.weight'], rule: m3}"
LAYOUTS = {
    "dp 2, tp 2, sequence parallel": (
        *("parallel.dp=2", "parallel.tp=2", "parallel.sequence_parallel=true"),
        "model.cms.levels.slow.wire=bf16",
    ),
    "dp 2, zero 1": ("parallel.dp=2", "parallel.zero=1"),
    "dp 2, zero 2": ("parallel.dp=2", "parallel.zero=2"),
    "dp 2, zero 3": ("parallel.dp=2", "parallel.zero=3"),
    "tp 2": ("parallel.tp=2",),
    "cp 2": ("parallel.cp=2", "train.seq_len=32"),
    "pp 2": ("model.num_layers=2", "parallel.pp=2"),
    "pp 2, two slices": ("model.num_layers=4", "parallel.pp=2", "parallel.virtual_stages=2"),
    "m3, dp 2": ("parallel.dp=2", M3),
    "m3, dp 2, tp 2, gather": ("parallel.dp=2", "parallel.tp=2", "optim.tp_mode=gather", M3),
}


MEMORIES = ("self_modify_kernel", "self_modify_back_kernel", "replay_kernel", "move_start_kernel")
SEGMENTS = ("train.segments=2", "train.seq_len=64", "train.global_batch_tokens=128")
MIXERS = {
    "hope": (),
    "pieces of documents": ("model.mixers.hope.reset_every=16", "train.seq_len=32"),
    "attention": ("model.mixers.hope.kind=attention",),
    "segments": SEGMENTS,
    "attention in segments": ("model.mixers.hope.kind=attention", *SEGMENTS),
    "rests of long chunks": (
        "model.mixers.hope.chunk_size=128",
        "train.segments=2",
        "train.seq_len=512",
        "train.global_batch_tokens=1024",
    ),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return device.build(tmp_path_factory.mktemp("fake_cuda"))


def run(module: str, library: Path, what: Any) -> Any:
    """Run a module of the fake device in a process of its own, and return what it found."""
    command = [sys.executable, "-m", f"tests.support.fake_cuda.{module}", str(library), json.dumps(what)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def ranks(library: Path) -> dict[str, list[dict[str, Any]]]:
    runs = [("debug", [*SMALL, *how]) for how in LAYOUTS.values()]
    return dict(zip(LAYOUTS, run("step", library, runs), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_lies_on_the_device_and_kernels_get_whole_tensors(layout: str, ranks: dict[str, Any]):
    for rank in ranks[layout]:
        assert rank["weights"] == [["cuda:0", "torch.bfloat16"], ["cuda:0", "torch.float32"]]
        assert rank["held"] == ["cuda"]
        assert rank["launches"]
        assert all(each["devices"] == ["cuda:0"] and each["contiguous"] for each in rank["launches"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_host_waits_for_the_device_nowhere_in_a_step(layout: str, ranks: dict[str, Any]):
    for rank in ranks[layout]:
        assert (rank["host_reads"], rank["noticed"]) == ({}, 1), "one read behind the step is noticed"


@pytest.fixture(scope="module")
def within_documents(library: Path) -> dict[str, dict[str, Any]]:
    runs = [("debug", [*SMALL, "model.within_documents=true", *how]) for how in MIXERS.values()]
    return {name: rank for name, (rank,) in zip(MIXERS, run("step", library, runs), strict=True)}


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_host_waits_for_no_documents_either(mixer: str, within_documents: dict[str, Any]):
    found = within_documents[mixer]
    assert (found["host_reads"], found["noticed"]) == ({}, 1) and found["launches"]


@pytest.mark.parametrize("mixer", MIXERS)
def test_kernels_of_memories_are_compiled_before_the_first_step(mixer: str, within_documents: dict[str, Any]):
    """The last chunks of documents, of any length, and pieces that go on run by kernels that whole sequences need."""
    found = within_documents[mixer]
    assert [name for name, _ in found["compiled_late"] if name in MEMORIES] == []
    assert ("attention" in mixer) != any(each["kernel"] in MEMORIES for each in found["launches"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_of_a_group_exchange_the_same_in_the_same_order(layout: str, ranks: dict[str, Any]):
    assert problems([rank["exchanges"] for rank in ranks[layout]]) == []
    assert all(rank["exchanges"] for rank in ranks[layout])


def test_an_exchange_in_another_order_is_noticed():
    def together(*shapes: int) -> list[list[Any]]:
        return [[[0, 1], "allreduce", None, [[[shape], "torch.float32", "cuda"]]] for shape in shapes]

    def sent(name: str, peer: int, shape: int) -> list[Any]:
        return [[0, 1], name, peer, [[[shape], "torch.float32", "cuda"]]]

    assert problems([together(1, 2), together(1, 2)]) == []
    assert problems([together(1, 2), together(2, 1)]) and problems([together(1), together(1, 1)])
    assert problems([[sent("send", 1, 4)], [sent("recv", 0, 4)]]) == []
    to_all = [
        [[[0, 1], "all_to_all_single", None, [[[size], kind, "cuda"]]]] for size, kind in ((1, "a"), (2, "a"), (2, "b"))
    ]
    assert problems(to_all[:2]) == [] and problems(to_all[1:])
    assert problems([[sent("send", 1, 4)], [sent("recv", 0, 5)]]) and problems([[sent("send", 1, 4)], []])


def problems(exchanges: Sequence[list[list[Any]]]) -> list[str]:
    """Return where ranks would wait for each other for ever: groups that disagree, sends that nobody receives.

    In an exchange of everybody with everybody each rank may send and get as much as it likes.
    """
    groups: dict[tuple[int, ...], dict[int, list[Any]]] = defaultdict(dict)
    pairs: dict[tuple[str, int, int], list[Any]] = defaultdict(list)
    for rank, done in enumerate(exchanges):
        for group, name, peer, what in done:
            if name in ("send", "recv"):
                ends = (rank, peer) if name == "send" else (peer, rank)
                pairs[name, *ends].append(what)
            else:
                kinds = [each[1:] for each in what] if name.startswith(("alltoall", "all_to_all")) else what
                groups[tuple(group)].setdefault(rank, []).append((name, kinds))
    found = [
        f"ranks {first} and {second} of {members} differ"
        for members, of_rank in groups.items()
        for first, second in combinations(members, 2)
        if of_rank.get(first) != of_rank.get(second)
    ]
    for sender, receiver in {(sender, receiver) for _, sender, receiver in pairs}:
        if pairs["send", sender, receiver] != pairs["recv", sender, receiver]:
            found.append(f"{receiver} does not receive what {sender} sends")
    return found


def test_a_block_of_hope_moves_few_bytes_in_few_launches(library: Path):
    # At d_model 2048, heads of 64, 8 sequences of 4,096 tokens, without products of matrices and the memories' kernels.
    (found,) = run("counts", library, [["hope_1.3b", ["model.num_heads=32"], 8, 4096]])
    assert found["bytes"] <= 11.7e9 and found["launches"] <= 30
    assert found["by_operation"]["_forward"][0] == found["by_operation"]["_backward"][0] == 9
    model = load_recipe("hope_1.3b", ["model.num_heads=32"]).config.model
    planned = between_products_bytes(model, model.mixers["hope"], "bf16") * 8 * 4096
    assert planned == pytest.approx(found["bytes"], rel=0.05)  # without weights laid out, and sums of their gradients


WIDE = (
    *("model.num_layers=1", "model.d_model=256", "model.mixers.hope.chunk_size=64", "train.seq_len=512"),
    *("train.micro_batch_size=4", "train.global_batch_tokens=2Ki", "train.validation.every=null"),
)
HELD = {
    "bf16, many logits": ("train.precision=bf16", "model.vocab_size=64000"),
    "bf16, many logits on two ranks": ("train.precision=bf16", "model.vocab_size=128000", "parallel.tp=2"),
    "pieces": ("train.precision=bf16", "train.segments=2"),
    "four pieces, two blocks": ("train.precision=bf16", "train.segments=4", "model.num_layers=2"),
    "m3, few tokens": (
        *("train.seq_len=64", "train.micro_batch_size=1", "train.global_batch_tokens=64", "model.num_layers=1"),
        *(
            "model.cms.levels.fast.d_ff=4096",
            M3,
            "optim.m3.frequency=1",  # what reads the slow memory anew takes most
        ),
    ),
    "m3 of gathered matrices": (
        *("train.seq_len=64", "train.micro_batch_size=1", "train.global_batch_tokens=64", "model.num_layers=1"),
        *("model.cms.levels.fast.d_ff=4096", "parallel.tp=2", "optim.tp_mode=gather", "optim.m3.frequency=1"),
        M3,
    ),
    "linear, blocks again": ("model.mixers.hope.memory=linear", "train.recompute=block", "model.num_heads=4"),
}
ALWAYS = ("bf16, many logits", "bf16, many logits on two ranks", "m3 of gathered matrices")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.nightly) for name in HELD]
)
def test_a_step_holds_what_its_plan_says(name: str, library: Path):
    overrides = [*WIDE, *HELD[name]]
    (ranks,) = run("memory", library, [("debug", overrides)])
    config = trained_on(load_recipe("debug", overrides).config, "H100")
    planned = device_memory_of_stage(Holdings(config), config, smallest_layout(config), 0)
    assert planned.peak == pytest.approx(max(most for held in ranks for most, _ in held.values()), rel=0.05)
