"""A model whose weights are partitioned over replicas by DeepSpeed (ZeRO stage 3), and AdamW on the partitions.

DeepSpeed gathers weights before a module needs them and frees them afterwards. Its stage 3 optimizer is not used: it
updates everything at every step, overwrites gradients that are to be summed over steps, and holds weights of one type.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hopescale.cost.updates import BUCKET_ELEMENTS
from hopescale.optim import RuleGroup
from hopescale.optim.adamw import AdamW


class PartitionedModel:
    """Weights in equal parts over replicas, whole only while they are used; gradients summed to the same parts.

    Args:
        model: Model whose parameters are empty from here on, except where its modules run.
        parameters: All of its parameters, by name.
        whole: Kinds of modules whose parameters are gathered at once, before their forward and backward pass. What the
            model has outside of them is gathered for the whole of its passes.
        dp_group: Replicas.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        whole: Collection[type[nn.Module]],
        dp_group: dist.ProcessGroup,
    ):
        self.dp_group, self.gradients = dp_group, {}
        self._numbers = {name: parameter.numel() for name, parameter in parameters.items()}
        self._offload = _partition(model, whole, dp_group)
        self._weights = {name: parameter.ds_tensor for name, parameter in parameters.items()}
        self._complete: list[tuple[str, Tensor]] = []
        self._room = BUCKET_ELEMENTS
        # After the hooks of DeepSpeed, which are there by now.
        model.register_forward_hook(self._end_forward)
        for name, parameter in parameters.items():
            # The graph remembers the shape it finds here.
            parameter.all_gather()
            parameter.register_post_accumulate_grad_hook(self._taker(name))
            parameter.partition()

    def _taker(self, name: str):
        def take(parameter: Tensor) -> None:
            if parameter.grad.numel() > self._room:
                self.flush()
            self._complete.append((name, parameter.grad))
            self._room -= parameter.grad.numel()
            parameter.grad = None

        return take

    @torch.no_grad()
    def flush(self) -> None:
        """Sum the gradients that are complete over replicas, float32, and add to each replica's part."""
        complete, self._complete, self._room = self._complete, [], BUCKET_ELEMENTS
        if not complete:
            return
        sizes = [self._weights[name].numel() for name, _ in complete]
        packed = complete[0][1].new_zeros(self.dp_group.size(), sum(sizes), dtype=torch.float32)
        for (_, gradient), columns in zip(complete, packed.split(sizes, dim=1), strict=True):
            whole = gradient.new_zeros(columns.numel(), dtype=torch.float32)
            whole[: gradient.numel()] = gradient.flatten()
            columns.copy_(whole.view_as(columns))
        part = packed.new_empty(sum(sizes))
        dist.reduce_scatter_tensor(part, packed.flatten(), group=self.dp_group)
        for (name, _), own in zip(complete, part.split(sizes), strict=True):
            self.gradient(name).add_(own[: self.gradient(name).numel()])

    def _end_forward(self, *_: object) -> None:
        """End a pass that has no backward: free its weights and forget its order, which is not that of training."""
        if torch.is_grad_enabled():
            return
        self._offload.partition_all_parameters()
        coordinator = self._offload.get_param_coordinator()
        if coordinator.is_record_trace():
            coordinator._invalidate_trace()

    def end_backward(self) -> None:
        """Sum what a backward pass has left over, free weights, and settle the order of modules from the first pass."""
        self.flush()
        self._offload.partition_all_parameters()
        coordinator = self._offload.get_param_coordinator()
        if coordinator.is_record_trace():
            coordinator.reset_step()

    def start_of(self, name: str) -> int:
        """Return where this replica's part of a parameter begins, in entries of the flattened parameter."""
        return min(self._numbers[name], self.dp_group.rank() * self._weights[name].numel())

    def weight(self, name: str) -> Tensor:
        """Return this replica's part of a parameter: a view, one-dimensional, maybe empty."""
        return self._weights[name].detach()[: self._numbers[name] - self.start_of(name)]

    def gradient(self, name: str) -> Tensor:
        """Return this replica's part of the sum of gradients, float32."""
        if name not in self.gradients:
            self.gradients[name] = torch.zeros_like(self.weight(name), dtype=torch.float32)
        return self.gradients[name]


class PartitionedShards:
    """Parameters of a partitioned model that are updated together; as `FlatShards`, but cut parameter by parameter.

    Args:
        model: Model that holds the weights and accumulates the gradients.
        parameters: Parameters by name, of one type.
        groups: Groups that share settings, every parameter in one.
        eps: Term of AdamW.
    """

    def __init__(
        self,
        model: PartitionedModel,
        parameters: Mapping[str, nn.Parameter],
        groups: Sequence[RuleGroup],
        *,
        eps: float,
    ):
        self.model, self.parameters, self.start_of = model, dict(parameters), model.start_of
        self.is_low_precision = next(iter(self.parameters.values())).dtype != torch.float32
        # Of a float32 parameter the part itself.
        self._masters = {name: nn.Parameter(model.weight(name).float()) for name in self.parameters}
        self._rule = AdamW([group.of(self._masters) for group in groups], eps=eps, foreach=True)

    def end_backward(self) -> None:
        """Reduce what a backward pass has left over."""
        self.model.end_backward()

    @torch.no_grad()
    def step(self, rates: Mapping[str, float]) -> None:
        """Update with the gradients here at each group's rate; they are gone afterwards."""
        for group in self._rule.param_groups:
            group["lr"] = rates[group["name"]]
        for name, master in self._masters.items():
            master.grad = self.model.gradient(name)
        self._rule.step()
        for name, master in self._masters.items():
            master.grad = None
            del self.model.gradients[name]
            if self.is_low_precision:
                self.model.weight(name).copy_(master)

    @torch.no_grad()
    def scale(self, scales: Mapping[str, Tensor | float]) -> None:
        """Multiply the gradients here by the factor of each parameter."""
        for name in self.parameters:
            self.part(name, "gradient").mul_(scales[name])

    def finish(self) -> None:
        """Wait for nothing: `step` has."""

    def discard(self) -> None:
        """Drop the gradients here."""
        for name in self.parameters:
            self.model.gradients.pop(name, None)

    def part(self, name: str, key: str) -> Tensor:
        """Return this replica's part of a parameter's tensor, as of `FlatShards`."""
        if key == "weight":
            return self.model.weight(name)
        if key == "master":
            return self._masters[name].detach()
        return self.model.gradient(name) if key == "gradient" else self._rule.state[self._masters[name]][key]

    def step_of(self, name: str) -> Tensor:
        """Return the number of updates of a parameter, a view."""
        return self._rule.state[self._masters[name]]["step"]


def _partition(model: nn.Module, whole: Collection[type[nn.Module]], dp_group: dist.ProcessGroup):
    import deepspeed
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.utils import set_z3_leaf_module
    from deepspeed.utils.timer import NoopTimer

    inside: set[nn.Parameter] = set()
    largest = 0
    for module in model.modules():
        if isinstance(module, tuple(whole)):
            set_z3_leaf_module(module, True)
            inside.update(module.parameters())
            largest = max(largest, sum(parameter.numel() for parameter in module.parameters()))
    outside = sum(parameter.numel() for parameter in model.parameters() if parameter not in inside)
    parameter = next(model.parameters())
    # Launchers set it; DeepSpeed looks here for the device, now and in forward passes.
    os.environ["LOCAL_RANK"] = str(parameter.device.index or 0)
    # Its memory-efficient linear would replace torch's in the whole process.
    deepspeed.zero.Init(module=model, data_parallel_group=dp_group, mem_efficient_linear=False, dtype=parameter.dtype)
    offload = DeepSpeedZeRoOffload(
        model,
        timers=NoopTimer(),
        ds_config=None,
        overlap_comm=parameter.device.type == "cuda",
        # The module that runs and the next one are whole, and what belongs to none.
        prefetch_bucket_size=largest,
        max_live_parameters=2 * largest + outside,
        # Weights are freed after each use, however soon the next is.
        max_reuse_distance=0,
        param_persistence_threshold=0,
        model_persistence_threshold=0,
        dp_process_group=dp_group,
    )
    for parameter in model.parameters():
        if parameter not in inside:
            # A tied embedding is used where its module does not run.
            deepspeed.zero.register_external_parameter(model, parameter)
    return offload
