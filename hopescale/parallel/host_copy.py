"""Numbers that the host reads when the device has them, while the device goes on."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A copy on the host of a few numbers of a device, which begins now and is waited for when it is read.

    Args:
        values: Numbers of one dimension, which nobody changes afterwards.
    """

    def __init__(self, values: Tensor):
        self._event: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            # Into page-locked memory, behind what the device has been given until now.
            values = values.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        self._values = values
        self._read: list[float] | None = None

    def read(self) -> list[float]:
        """Return the numbers; wait until they are there, the first time."""
        if self._read is None:
            if self._event is not None:
                self._event.synchronize()
            self._read = self._values.tolist()
        return self._read
