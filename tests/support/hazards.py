"""What threads of a program could see too early: accesses of one address that no barrier parts, in the interpreter.

The interpreter runs an operation for all threads before the next one, so that a result is right without a barrier too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest


class Access(NamedTuple):
    """A load or a store of many addresses.

    Attributes:
        stores: Whether it is a store.
        where: Where it stands in the kernel's code: the innermost function of ours and its callers.
        addresses: Addresses that it meets, in order.
    """

    stores: bool
    where: str
    addresses: np.ndarray

    def meets(self, other: Access) -> bool:
        """Tell whether both meet an address which one of them writes."""
        mine, others = self.addresses, other.addresses
        if not (self.stores or other.stores) or not (mine.size and others.size):
            return False
        apart = mine[-1] < others[0] or others[-1] < mine[0]
        return not apart and bool(np.isin(mine, others, assume_unique=True).any())


@contextmanager
def watched_barriers(package: str) -> Iterator[set[str]]:
    """Collect pairs of accesses that a program makes to one address without a barrier between them.

    Two loads are no pair. What a program did is forgotten when the next one begins.

    Args:
        package: Folder whose functions are named, such as `self_modifying/triton`.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    since: list[Access] = []
    pairs: set[str] = set()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    barrier, place = InterpreterBuilder.create_barrier, InterpreterBuilder.set_grid_idx

    def note(stores: bool, pointers: Any, mask: Any) -> None:
        there = np.broadcast_to(np.asarray(mask.data, bool), np.shape(pointers.data))
        access = Access(stores, _where(package), np.unique(np.asarray(pointers.data)[there]))
        pairs.update(f"{other.where} and {access.where}" for other in since if access.meets(other))
        since.append(access)

    def noted_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        note(False, pointers, mask)
        return load(builder, pointers, mask, *rest)

    def noted_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(True, pointers, mask)
        return store(builder, pointers, value, mask, *rest)

    def forget(function: Any) -> Any:
        def forgetting(*arguments: Any) -> Any:
            since.clear()
            return function(*arguments)

        return forgetting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", noted_load)
        patch.setattr(InterpreterBuilder, "create_masked_store", noted_store)
        patch.setattr(InterpreterBuilder, "create_barrier", forget(barrier))
        patch.setattr(InterpreterBuilder, "set_grid_idx", forget(place))
        yield pairs


def _where(package: str) -> str:
    frame, found = sys._getframe(3), []
    while frame is not None and len(found) < 2:
        path = Path(frame.f_code.co_filename)
        if package in path.as_posix():
            found.append(f"{path.name}:{frame.f_lineno} ({frame.f_code.co_name})")
        frame = frame.f_back
    return " by ".join(found)
