"""Memories in packed sequences: documents in one window against each of them run alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hopescale.config.schema import ModelConfig, SelfModifyingConfig
from hopescale.models.init import initialize
from hopescale.models.self_modifying import SelfModifying
from hopescale.ops.cpp import build
from hopescale.ops.documents import Documents
from hopescale.ops.self_modifying import Memories, Streams, self_modifying
from hopescale.parallel.mesh import Mesh
from tests.support.naive_mixer import SWITCHES, naive_mixer

WIDTH, HEADS, DIM = 12, 2, 16
ROWS = [[1, 7, 4, 1, 1, 16, 3], [13, 8, 12]]
"""Tokens of the documents of two sequences, with chunks of 4."""

FUSED = [name for name in SWITCHES if "two chunk" not in name and name != "hidden width"]
needs_cpp = pytest.mark.skipif(build.problem() is not None, reason="no C++ compiler could build the library")


def make_mixer(changes: dict, backend: str, recompute: str = "none") -> SelfModifying:
    config = replace(SelfModifyingConfig(chunk_size=4), **changes)
    model = ModelConfig(d_model=WIDTH, num_heads=HEADS, head_dim=DIM)
    mixer = SelfModifying(model, config, out_std=0.3, mesh=Mesh.alone(), backend=backend, recompute=recompute)
    initialize(mixer, 0, Mesh.alone())
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=g)
    return mixer


def documents_of(rows: list[list[int]]) -> Documents:
    ids = [[5 + n for n, length in enumerate(row) for _ in range(length)] for row in rows]
    return Documents.of(torch.tensor(ids))


def make_input(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    return torch.randn(2, sum(rows[0]), len(rows), WIDTH, generator=torch.Generator().manual_seed(5))


def packed(mixer: SelfModifying, x: Tensor, rows: list[list[int]]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    y, state = mixer(x, documents=documents_of(rows))
    named = state.named()
    return y, [{name: tensor[row] for name, tensor in named.items()} for row in range(len(rows))]


def apart(mixer: SelfModifying, x: Tensor, rows: list[list[int]]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    parts, ends = [], []
    for row, lengths in enumerate(rows):
        results = [mixer(part) for part in x[:, row : row + 1].split(lengths)]
        parts.append(torch.cat([y for y, _ in results]))
        ends.append({name: tensor[0] for name, tensor in results[-1][1].named().items()})
    return torch.cat(parts, dim=1), ends


def naive(mixer: SelfModifying, x: Tensor, rows: list[list[int]]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    columns = [
        torch.cat([naive_mixer(mixer, part) for part in x[:, n : n + 1].split(row)]) for n, row in enumerate(rows)
    ]
    return torch.cat(columns, dim=1), [{} for _ in rows]


def check(run, reference, mixers: list[SelfModifying], tolerance: float, rows: list[list[int]] = ROWS) -> None:
    """Compare outputs, the state after each sequence and all gradients of a sum over both, relative to the largest."""
    found = []
    for function, mixer in zip((run, reference), mixers, strict=True):
        x, weights = (part.to(mixer.in_proj.weight) for part in make_input(rows))
        y, ends = function(mixer, x.requires_grad_(), rows)
        g = torch.Generator().manual_seed(9)
        loss = (y * weights).sum()
        if reference is apart:
            loss = loss + sum(
                (part * torch.randn(part.shape, generator=g)).sum() for end in ends for part in end.values()
            )
        inputs = {"x": x} | dict(mixer.named_parameters())
        gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True, materialize_grads=True)
        states = {f"state {n}/{name}": part for n, end in enumerate(ends) for name, part in end.items()}
        states = states if reference is apart else {}
        found.append({"y": y} | states | {f"d {name}": part for name, part in zip(inputs, gradients, strict=True)})
    for name, expected in found[1].items():
        scale = float(expected.detach().abs().max()) + 1e-9
        error = float((found[0][name].detach().double() - expected.detach().double()).abs().max()) / scale
        assert error <= tolerance, f"{name} is off by {error:.1e} of its largest entry"


@pytest.mark.parametrize("switch", SWITCHES)
def test_the_loop_over_packed_documents_equals_each_of_them_alone(switch: str):
    mixer = make_mixer(SWITCHES[switch], "torch").double()
    check(packed, apart, [mixer, mixer], 1e-11)


@needs_cpp
@pytest.mark.parametrize("switch", FUSED)
def test_packed_documents_in_one_operation_equal_each_of_them_alone(switch: str):
    mixer = make_mixer(SWITCHES[switch], "cpp")
    check(packed, apart, [mixer, mixer], 2e-6)


@pytest.mark.parametrize("switch", ["default", "no momentum", "two chunk sizes", "stored values", "no conv", "resets"])
def test_packed_documents_equal_the_equations_of_each_alone(switch: str):
    mixer = make_mixer(SWITCHES[switch], "torch").double()
    check(packed, naive, [mixer, mixer], 1e-9)


@pytest.mark.parametrize("recompute", ["chunks", "reverse"])
@pytest.mark.parametrize("switch", ["default", "no momentum", "two chunk sizes"])
def test_chunks_computed_again_keep_documents_apart(switch: str, recompute: str):
    mixers = [make_mixer(SWITCHES[switch], "torch", how).double() for how in (recompute, "none")]
    check(packed, apart, mixers, 1e-11)


LENGTHS = {"tokens": [[1] * 9], "one": [[19]], "pairs": [[2, 2, 2], [1, 4, 1]], "whole chunks": [[4, 8, 4]]}


@pytest.mark.parametrize("rows", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_cpp)])
def test_documents_of_any_length_are_apart(rows: list[list[int]], backend: str):
    mixer = make_mixer({}, backend)
    mixer = mixer.double() if backend == "torch" else mixer
    check(packed, apart, [mixer, mixer], 1e-11 if backend == "torch" else 2e-6, rows)


def test_short_documents_may_take_several_passes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hopescale.ops.self_modifying.side_by_side.MOST_RESTS", 2)
    mixer = make_mixer({}, "torch").double()
    check(packed, apart, [mixer, mixer], 1e-11)


@pytest.mark.parametrize("backend", ["torch", pytest.param("cpp", marks=needs_cpp)])
def test_one_document_is_what_a_sequence_is_without_documents(backend: str):
    mixer = make_mixer({}, backend)
    x = make_input([[19], [19]])[0]
    assert torch.equal(mixer(x, documents=documents_of([[19], [19]]))[0], mixer(x)[0])


@needs_cpp
def test_two_threads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch):
    """Gradients of the state that documents share are added up in one order."""
    monkeypatch.setattr("hopescale.ops.self_modifying.cpp.GROUP", 8)
    mixer, found = make_mixer({}, "cpp"), []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        y, _ = packed(mixer, make_input(ROWS)[0], ROWS)
        found.append([y, *torch.autograd.grad(y.square().sum(), list(mixer.parameters()))])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_the_probe_counts_real_tokens():
    mixer, rows = make_mixer({}, "torch").double(), [[1, 18]]
    x, probes = make_input(rows)[0].double(), [{}, {}, {}]
    mixer(x, documents=documents_of(rows), probe=probes[0])
    for part, probe in zip(x.split(rows[0]), probes[1:], strict=True):
        mixer(part, probe=probe)
    for name in ("eta_mean", "alpha_mean", "surprise"):
        torch.testing.assert_close(probes[0][name], (probes[1][name] + 18 * probes[2][name]) / 19)
    torch.testing.assert_close(probes[0]["state_norm"], probes[2]["state_norm"])
    heads = mixer.heads
    together, *alone = (probe["tokens"].unflatten(0, (heads, -1)) for probe in probes)
    torch.testing.assert_close(together, torch.cat(alone, dim=1))


def test_documents_of_earlier_tokens_are_unknown():
    mixer, x = make_mixer({}, "torch"), make_input([[4]])[0]
    _, state = mixer(x)
    with pytest.raises(ValueError, match="documents are given, but the documents of the tokens in the state"):
        mixer(x, state, documents=documents_of([[4]]))


def test_documents_of_a_share_of_the_tokens_are_refused():
    mixer, x = make_mixer({}, "torch"), make_input([[4]])[0]
    with pytest.raises(ValueError, match=r"documents are of tokens \[1, 2\], but there are \[1, 4\]"):
        mixer(x, documents=documents_of([[2]]))


def test_the_operation_refuses_what_does_not_go_with_its_documents():
    mixer = make_mixer({}, "torch")
    streams = Streams(*(torch.zeros(1, HEADS, 4, DIM) for _ in "kvq"), *(torch.zeros(1, HEADS, 4) for _ in range(3)))
    one, two = (Memories(mixer.banks["memory"].initial_state(batch, True), None) for batch in (1, 2))
    for documents, state, position, message in (
        (documents_of([[4]]), one, 3, "those of the 3 tokens before are unknown"),
        (documents_of([[5]]), one, 0, r"documents are of tokens \[1, 5\], but there are \[1, 4\]"),
        (documents_of([[4]]), two, 0, "the state is for a batch of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            self_modifying(streams, state, mixer.spec, documents=documents, position=position)
