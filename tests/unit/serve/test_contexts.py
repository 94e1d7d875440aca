from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from hopescale.common.errors import CheckpointError
from hopescale.infer import load
from hopescale.infer.generate import prefill
from hopescale.infer.state import write_state
from hopescale.serve.contexts import Contexts
from tests.support.loaded import make_loaded


def test_contexts_leave_memory_and_come_back(tmp_path: Path):
    """Two fit: the one that was asked longest ago is read from its file when it is asked again."""
    loaded = make_loaded()
    readings = {
        name: prefill(loaded.model, torch.tensor([ids]))
        for name, ids in zip("abc", ([5], [6, 7], [8, 9, 4]), strict=True)
    }
    contexts = Contexts(loaded, tmp_path / "contexts", most=2)
    for name in "ab":
        contexts.put(name, readings[name])
    contexts.get("a")
    contexts.put("c", readings["c"])
    assert contexts.names() == ["a", "b", "c"]
    assert [contexts.get(name).reading is readings[name] for name in "ac"] == [True, True]
    again = contexts.get("b").reading
    assert again is not readings["b"] and torch.equal(again.logits, readings["b"].logits)
    assert contexts.get("c").reading is readings["c"] and contexts.get("a").reading is not readings["a"]


def test_a_context_is_asked_while_another_is_written(tmp_path: Path, monkeypatch):
    loaded = make_loaded()
    reading = prefill(loaded.model, torch.tensor([[5, 6]]))
    contexts = Contexts(loaded, tmp_path / "contexts")
    contexts.put("small", reading)
    begun, may_end, write = threading.Event(), threading.Event(), write_state

    def slow(*args: object) -> None:
        begun.set()
        assert may_end.wait(60)
        write(*args)

    monkeypatch.setattr("hopescale.serve.contexts.write_state", slow)
    with ThreadPoolExecutor(2) as pool:
        writing = pool.submit(contexts.put, "large", reading)
        assert begun.wait(60)
        asking = pool.submit(lambda: (contexts.get("small").tokens, contexts.names()))
        try:
            assert asking.result(timeout=60) == (2, ["small"])
        finally:
            may_end.set()
        assert writing.result().name == "large"
    assert contexts.names() == ["large", "small"]


def test_a_context_outlives_a_replacement_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = make_loaded()
    small, large = (prefill(loaded.model, torch.tensor([ids])) for ids in ([5], [6, 7]))
    Contexts(loaded, tmp_path).put("a", small)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == ".new-a":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail)
        with pytest.raises(CheckpointError, match="cannot write .*a: No space left on device"):
            Contexts(loaded, tmp_path).put("a", large)
    assert Contexts(loaded, tmp_path).get("a").tokens == 1
    (tmp_path / "a").rename(tmp_path / ".old-a")  # as a kill between the two leaves it
    contexts = Contexts(loaded, tmp_path)
    assert contexts.get("a").tokens == 1
    contexts.put("a", large)
    assert Contexts(loaded, tmp_path).get("a").tokens == 2
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_weights_are_read_once_for_all_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = make_loaded()
    digests, digest = [], load.weights_digest
    monkeypatch.setattr(load, "weights_digest", lambda model: digests.append(model) or digest(model))
    contexts = Contexts(loaded, tmp_path / "contexts", most=1)
    for name in ("a", "b", "a"):
        contexts.put(name, prefill(loaded.model, torch.tensor([[5]])))
        contexts.get("a")
    assert len(digests) == 1
