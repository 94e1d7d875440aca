"""Speed and memory of a run. Adds up the numbers that it is given; reads no clock."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Throughput:
    """Means over the steps since the last snapshot.

    Args:
        num_devices: Devices that share the tokens told to `add`.
        flops_per_token: Model FLOPs of one token, forward and backward.
        peak_flops: FLOPs per second of one device at best; without either of the two there is no `mfu`.
    """

    def __init__(self, *, num_devices: int = 1, flops_per_token: float | None = None, peak_flops: float | None = None):
        self._num_devices, self._flops_per_token, self._peak_flops = num_devices, flops_per_token, peak_flops
        self._reset()

    def add(self, tokens: int, step_seconds: float, data_seconds: float) -> None:
        """Count a step; its `data_seconds` are the part of `step_seconds` in which the host read data."""
        self._tokens += tokens
        self._step_seconds += step_seconds
        self._data_seconds += data_seconds
        self._steps += 1

    def snapshot(self) -> dict[str, float]:
        """Return `tps`, `time/step_s`, `time/data_s` and, where it is known, `mfu`; then start a new interval.

        Empty when no step has been counted.
        """
        if not self._steps or self._step_seconds <= 0:
            return {}
        tps = self._tokens / self._step_seconds / self._num_devices
        values = {
            "tps": tps,
            "time/step_s": self._step_seconds / self._steps,
            "time/data_s": self._data_seconds / self._steps,
        }
        if self._flops_per_token and self._peak_flops:
            values["mfu"] = tps * self._flops_per_token / self._peak_flops
        self._reset()
        return values

    def _reset(self) -> None:
        self._tokens = self._steps = 0
        self._step_seconds = self._data_seconds = 0.0


def peak_memory_gib(device: torch.device) -> float:
    """Return the highest memory so far in GiB: allocated by torch on a CUDA device, resident in the process on CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
