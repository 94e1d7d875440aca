"""The axes a run is split over, as an object that is passed down."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from hopescale.config.layout import Layout
from hopescale.parallel.control import Control
from hopescale.parallel.cpu import let_megatron_use_the_cpu
from hopescale.parallel.groups import OwnGroups, open_rings
from hopescale.parallel.process import start_alone
from hopescale.parallel.tiers import Tiers

CPU = torch.device("cpu")

CHECKPOINT_TIMEOUT = timedelta(hours=2)
"""How long ranks wait for the slowest disk."""


@dataclass(frozen=True)
class Mesh:
    """Where this process stands on each axis. Ranks count tensor-parallel neighbours first, pipeline stages last.

    Attributes:
        tp_group: Ranks that share each layer (tensor parallel).
        dp_group: Ranks that hold the same part of the model and read other tokens: replicas, and of each the ranks that
            share its sequences. Gradients are summed over them.
        cp_group: Ranks that share the sequences of a replica (context parallel), in the order of the tokens.
        cp_back_group: The same ranks, for messages from a higher number to a lower one.
        pp_group: Ranks that hold the stages of one replica (pipeline parallel), in order.
        embedding_group: First and last stage, which both hold a tied embedding; of this process alone elsewhere.
        world_group: All ranks.
        control_group: All ranks, on the CPU, for decisions (`control`).
        checkpoint_group: All ranks, on the CPU, for saves in the background alone.
        sequence_parallel: Whether activations between layers are split over `tp_group` along the tokens.
        virtual_stages: Slices of the model each rank of `pp_group` holds (interleaved pipeline).
        node_group: Ranks of `dp_group` on this node; None where nodes play no part in sums.
        nodes_group: Ranks of `dp_group` that have this rank's place on their nodes; None likewise.
    """

    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    cp_back_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    embedding_group: dist.ProcessGroup
    world_group: dist.ProcessGroup
    control_group: dist.ProcessGroup
    checkpoint_group: dist.ProcessGroup
    sequence_parallel: bool = False
    virtual_stages: int = 1
    node_group: dist.ProcessGroup | None = None
    nodes_group: dist.ProcessGroup | None = None

    @classmethod
    def over_all(cls, layout: Layout, *, device: torch.device = CPU, timeout: timedelta | None = None) -> Mesh:
        """Split the running processes as `layout` says. Called once per process.

        Megatron keeps these groups in its own global state, where its schedules and its loss look for them.

        Args:
            layout: Degrees of the axes, whose product is the number of processes.
            device: Device of this process.
            timeout: Longest wait of an exchange for the other ranks; None is torch's default.
        """
        if device.type != "cuda":
            let_megatron_use_the_cpu()
        groups = OwnGroups(layout)
        with groups.given_to_megatron():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=layout.tp,
                pipeline_model_parallel_size=layout.pp,
                context_parallel_size=layout.cp,
                virtual_pipeline_model_parallel_size=layout.virtual_stages if layout.virtual_stages > 1 else None,
                create_gloo_process_groups=False,
            )
        mesh = cls(
            tp_group=groups.tp,
            dp_group=groups.dp,
            cp_group=groups.cp,
            cp_back_group=groups.cp_back,
            pp_group=groups.pp,
            embedding_group=groups.ends,
            world_group=dist.group.WORLD,
            control_group=dist.new_group(backend="gloo"),
            checkpoint_group=dist.new_group(backend="gloo", timeout=CHECKPOINT_TIMEOUT),
            sequence_parallel=layout.sequence_parallel,
            virtual_stages=layout.virtual_stages,
            node_group=groups.node,
            nodes_group=groups.nodes,
        )
        if timeout is not None:
            mesh.set_timeout(timeout)
        over_gloo = [mesh.control_group, mesh.checkpoint_group]
        open_rings(over_gloo if device.type == "cuda" else [*mesh.axes().values(), *over_gloo])
        return mesh

    @classmethod
    def alone(cls) -> Mesh:
        """Return the mesh of a process that shares its model with no other."""
        start_alone()
        if dist.get_world_size() == 1:
            own = dist.group.WORLD
        else:
            own = dist.new_group([dist.get_rank()], use_local_synchronization=True)
        return cls(own, own, own, own, own, own, own, own, own)

    @property
    def num_replicas(self) -> int:
        """Replicas of the model, each of which reads sequences of its own."""
        return self.dp_group.size() // self.cp_group.size()

    @property
    def replica(self) -> int:
        """Number of this process's replica, from 0."""
        return self.dp_group.rank() // self.cp_group.size()

    @property
    def is_first_stage(self) -> bool:
        """Whether this process is on the first stage of the pipeline."""
        return self.pp_group.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process is on the last stage of the pipeline."""
        return self.pp_group.rank() == self.pp_group.size() - 1

    @cached_property
    def tiers(self) -> Tiers:
        """The ranks of `dp_group` as they sum flat tensors."""
        return Tiers(self.dp_group, self.node_group, self.nodes_group)

    @cached_property
    def control(self) -> Control:
        """The agreement of all ranks."""
        return Control(self.control_group)

    def axes(self) -> dict[str, dist.ProcessGroup]:
        """Return the groups that move tensors of the model, by the name of their axis."""
        nodes = {} if self.node_group is None else {"node": self.node_group, "nodes": self.nodes_group}
        return {
            "tp": self.tp_group,
            "dp": self.dp_group,
            **nodes,
            "cp": self.cp_group,
            "cp back": self.cp_back_group,
            "pp": self.pp_group,
            "embedding": self.embedding_group,
            "world": self.world_group,
        }

    def set_timeout(self, timeout: timedelta) -> None:
        """Change how long an exchange may wait for the other ranks before it fails."""
        for group in {*self.axes().values(), self.control_group}:
            group.set_timeout(timeout)
