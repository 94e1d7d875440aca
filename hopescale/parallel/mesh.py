"""The axes a model is split over, as an object that is passed down."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state

from hopescale.parallel.process import start_alone


@dataclass(frozen=True)
class Mesh:
    """Where this process stands on each axis.

    Attributes:
        tp_group: Ranks that share each layer (tensor parallel).
    """

    tp_group: dist.ProcessGroup

    @classmethod
    def over_all(cls, *, tp: int) -> Mesh:
        """Split the running processes into groups of `tp` neighbours that share each layer. Called once per process.

        Megatron keeps these groups in its own global state, where its vocabulary-parallel loss looks for them.
        """
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
        return cls(parallel_state.get_tensor_model_parallel_group())

    @classmethod
    def alone(cls) -> Mesh:
        """Return the mesh of a process that shares its model with no other."""
        start_alone()
        if dist.get_world_size() == 1:
            return cls(dist.group.WORLD)
        return cls(dist.new_group([dist.get_rank()], use_local_synchronization=True))
