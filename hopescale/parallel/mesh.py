"""The axes a model is split over, as an object that is passed down."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from hopescale.parallel.process import start_alone


@dataclass(frozen=True)
class Mesh:
    """Where this process stands on each axis.

    Attributes:
        tp_group: Ranks that share each layer (tensor parallel).
    """

    tp_group: dist.ProcessGroup

    @classmethod
    def alone(cls) -> Mesh:
        """Return the mesh of a process that shares its model with no other."""
        start_alone()
        if dist.get_world_size() == 1:
            return cls(dist.group.WORLD)
        return cls(dist.new_group([dist.get_rank()], use_local_synchronization=True))
