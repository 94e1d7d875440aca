"""Which code runs memories: the answer for every device, request and shape."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hopescale.ops import backends, device
from hopescale.ops.backends import MemoryShape, choose_products, select, select_streams, unsupported_reason
from hopescale.ops.cpp import build

HOPE = MemoryShape(64, 64, 64, 64, sequential=True)
LAUNCHER_PROBLEM = backends._launcher_problem
STATIC = HOPE._replace(hidden=None, sequential=False)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand for a machine with a compiler and Triton."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(build, "problem", lambda: None)
    monkeypatch.setattr(backends, "_installation_problem", lambda: None)
    monkeypatch.setattr(backends, "_launcher_problem", lambda: None)


@pytest.mark.parametrize(
    ("memories", "how", "line"),
    [
        (HOPE, {"device": "cpu"}, "cpp, all chunks of a sequence in one operation (not triton: the device is cpu)"),
        (HOPE, {"device": "cuda"}, "triton, all chunks of a sequence in one operation, with bf16 products"),
        (STATIC, {"device": "cuda"}, "triton, all chunks of a sequence in one operation, with bf16 products"),
        (
            STATIC,
            {"device": "cuda", "needs_grad": False, "whole_chunks": False},
            "torch, all chunks of a sequence side by side (not triton: the sequence begins within a chunk; "
            "cpp: the device is cuda)",
        ),
        (
            HOPE,
            {"device": "rocm"},
            "torch, chunk after chunk (not triton: the device is rocm; cpp: the device is rocm)",
        ),
        (
            HOPE._replace(hidden=48),
            {"device": "cuda"},
            "torch, chunk after chunk (not triton: memories are 48 wide, not 16, 32, 64 or 128; "
            "cpp: the device is cuda)",
        ),
        (
            HOPE._replace(hidden=10),
            {"device": "cpu"},
            "torch, chunk after chunk (not triton: the device is cpu; cpp: memories are 10 wide, not a multiple of 16)",
        ),
        (
            STATIC,
            {"device": "cpu", "needs_grad": False},
            "cpp, all chunks of a sequence in one operation (not triton: the device is cpu)",
        ),
        (
            HOPE,
            {"device": "cpu", "dtype": "float64"},
            "torch, chunk after chunk (not triton: the device is cpu; "
            "cpp: the C++ is for float32 on a CPU, not float64 on cpu)",
        ),
    ],
)
def test_auto_is_the_fastest_that_can_run_and_says_why(memories: MemoryShape, how: dict, line: str):
    assert select("auto", memories, **how).describe(memories, "bf16") == line


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"compiled": True}, "train.compile takes the chunk loop"),
        ({"recompute": "reverse"}, "train.recompute: reverse takes the chunk loop"),
        ({"whole_chunks": False}, "the sequence begins within a chunk"),
    ],
)
@pytest.mark.parametrize(("backend", "device"), [("cpp", "cpu"), ("triton", "cuda")])
def test_the_loop_runs_what_one_operation_does_not(backend: str, device: str, how: dict, reason: str):
    assert select(backend, HOPE, device=device) == (backend, "")
    choice = select("auto", HOPE, device=device, **how)
    assert choice.backend == "torch" and f"{backend}: {reason}" in choice.reason
    refused = select(backend, HOPE, device=device, **how)
    assert refused.backend == ("torch" if "whole_chunks" in how else None)
    assert reason in refused.reason


def test_without_gradients_the_cpp_takes_any_chunks_and_triton_whole_ones():
    two, how = HOPE._replace(projection_chunk_size=128), {"needs_grad": False, "whole_chunks": False}
    assert select("auto", two, device="cpu", compiled=True, recompute="reverse", **how).backend == "cpp"
    assert select("triton", HOPE, device="cuda", **how) == ("torch", "triton: the sequence begins within a chunk")
    assert select("auto", HOPE, device="cuda", needs_grad=False).backend == "triton"
    assert select("auto", HOPE, device="cuda", needs_grad=False, tokens=64).backend == "triton"
    assert select("auto", HOPE, device="cuda", needs_grad=False, tokens=63).backend == "torch"
    assert select("auto", HOPE, device="cuda", tokens=63).backend == "triton"
    assert select("cpp", HOPE._replace(hidden=10), **how) == (None, "memories are 10 wide, not a multiple of 16")


def test_products_of_kernels_go_by_the_models_type_or_by_what_is_asked():
    assert [choose_products("auto", dtype) for dtype in ("bfloat16", "float32", "float64")] == ["bf16", *2 * ["tf32x3"]]
    assert choose_products("tf32", "bfloat16") == "tf32"


def test_two_chunk_sizes_take_the_loop():
    two = HOPE._replace(projection_chunk_size=128)
    assert select("auto", two, device="cpu").backend == "torch"
    assert select("cpp", two) == (None, "projection_chunk_size is 128, chunk_size 64")


def test_an_unknown_device_has_what_it_takes():
    assert select("cpp", HOPE).backend == "cpp" and select("triton", HOPE).backend == "triton"
    assert select("auto", HOPE._replace(head_dim=48)).backend == "cpp"
    assert select("triton", HOPE._replace(head_dim=48)) == (None, "heads are 48 wide, not 16, 32, 64 or 128")


def test_what_a_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "problem", lambda: "there is no compiler")
    monkeypatch.setattr(backends, "_installation_problem", lambda: "triton is not installed")
    assert select("auto", HOPE, device="cpu").reason.endswith("cpp: there is no compiler")
    assert select("cpp", HOPE, device="cpu") == (None, "there is no compiler")
    assert select("auto", HOPE, device="cuda").reason.startswith("triton: triton is not installed")
    assert select("torch", HOPE, device="cuda") == ("torch", "")


def test_triton_needs_an_nvidia_gpu_or_its_interpreter(monkeypatch: pytest.MonkeyPatch):
    assert unsupported_reason("triton", "cpu") == ("the kernels need an NVIDIA GPU, Ampere or later, the device is cpu")
    assert unsupported_reason("triton", "cuda", "float64") == "the kernels compute in float32, not float64"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select("triton", HOPE, device="cpu").backend == "triton"
    assert select("auto", HOPE, device="cpu").backend == "cpp"


def test_a_gpu_before_ampere_is_no_device_for_kernels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device.torch.cuda, "is_available", lambda: True)
    for capability, name in (((8, 0), "cuda"), ((9, 0), "cuda"), ((7, 0), "sm_70")):
        monkeypatch.setattr(device.torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert device.device_type(torch.device("cuda", 0)) == name
    choice = select("auto", HOPE, device="sm_70")
    assert choice.backend == "torch" and "triton: the device is sm_70" in choice.reason


def test_triton_needs_a_compiler_and_headers_to_launch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(backends, "_launcher_problem", LAUNCHER_PROBLEM.__wrapped__)
    monkeypatch.setattr(backends.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setenv("CC", "no-such-compiler -O1")
    assert "looked for no-such-compiler" in select("auto", HOPE, device="cuda").reason
    monkeypatch.setenv("CC", f"{sys.executable} -O1")
    assert select("triton", HOPE, device="cuda").reason.endswith(f"{tmp_path / 'Python.h'} is missing")
    (tmp_path / "Python.h").touch()
    assert select("auto", HOPE, device="cuda").backend == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert select("triton", HOPE, device="cpu").backend == "triton"


def test_streams_are_cut_in_cpp_where_that_can_run():
    assert select_streams("auto", 64, "cpu", "float32") == "cpp"
    for where in (("torch", 64, "cpu", "float32"), ("auto", 24, "cpu", "float32"), ("auto", 64, "cuda", "float32")):
        assert select_streams(*where) == "torch"
    assert select_streams("cpp", 64, "cpu", "bfloat16") == "torch"


def test_the_answer_needs_no_torch():
    code = "import sys, hopescale.ops.backends; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
