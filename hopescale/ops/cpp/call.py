"""How the C++ is called: addresses of tensors, and heads distributed over threads."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def pointer(x: Tensor | None) -> ctypes.c_void_p | None:
    """Return the address of a tensor's first number; the tensor must outlive it."""
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array:
    """Return the addresses of several tensors; None has none."""
    return (ctypes.c_void_p * len(tensors))(*[None if x is None else x.data_ptr() for x in tensors])


def parallel_for(run: Callable[[int, int], None], heads: int) -> None:
    """Call `run(begin, end)` for parts of `heads`, in as many threads as torch has."""
    threads = min(torch.get_num_threads(), heads)
    if threads <= 1:
        run(0, heads)
        return
    bounds = [heads * n // threads for n in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, bounds[:-1], bounds[1:]))
