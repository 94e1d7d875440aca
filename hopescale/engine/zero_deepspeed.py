"""DeepSpeed's ZeRO optimizer of stage 2, over parameters that are updated together. Where DeepSpeed is met."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hopescale.cost.updates import BUCKET_ELEMENTS
from hopescale.optim import RuleGroup
from hopescale.optim.adamw import adamw_state


def start_deepspeed(device: torch.device) -> None:
    """Import DeepSpeed for a device and let it use the process groups that are running. May be called again."""
    before = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = device.type
    try:
        import deepspeed
        from deepspeed.accelerator import get_accelerator

        get_accelerator()
    finally:
        # It is nobody else's business.
        os.environ.pop("DS_ACCELERATOR")
        os.environ |= {} if before is None else {"DS_ACCELERATOR": before}
    # It warns of what it is used for here on purpose, and calls names that torch will drop some day.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Else a C++ extension for inference is compiled at the start of a run, about a minute, and never called.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


class FlatShards:
    """Parameters of one type that are updated together, their masters and state in flat shards over replicas.

    Each rule group is one flat tensor of which every replica has an equal part, cut wherever it falls. DeepSpeed sums
    gradients to the replica that has their part, steps AdamW there, and gathers the new weights.

    Args:
        parameters: Parameters by name, on one device; their storage becomes part of a flat tensor.
        groups: Groups that share settings, every parameter in one.
        eps: Term of AdamW.
        dp_group: Replicas.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        groups: Sequence[RuleGroup],
        *,
        eps: float,
        dp_group: dist.ProcessGroup,
    ):
        self.parameters = dict(parameters)
        self.is_low_precision = next(iter(self.parameters.values())).dtype != torch.float32
        self._group_of = {name: index for index, group in enumerate(groups) for name in group.members}
        self._zero = _zero_optimizer(self.parameters, groups, eps, dp_group)
        self._flat: list[Tensor] = self._zero.single_partition_of_fp32_groups
        self._gradients: list[Tensor | None] = [None] * len(groups)
        for hook in self._zero._grad_acc_hooks:
            hook.remove()
        for name, parameter in self.parameters.items():
            parameter.register_post_accumulate_grad_hook(self._reduction(self._group_of[name]))
        for flat in self._flat:
            self._zero.optimizer.state[flat] = adamw_state(flat)

    def _reduction(self, group: int):
        return lambda parameter: self._zero.process_gradients(parameter, group)

    def end_backward(self) -> None:
        """Reduce what a backward pass has left over, and add all of it to the gradients here."""
        self._zero.overlapping_partition_gradients_reduce_epilogue()
        self._collect()

    def _collect(self) -> None:
        for index, parts in self._zero.averaged_gradients.items():
            flat = torch.cat([part.flatten() for part in parts])
            gathered = self._gradients[index]
            self._gradients[index] = flat if gathered is None else gathered.add_(flat)
            self._zero.averaged_gradients[index] = None

    def step(self, rates: Mapping[str, float]) -> None:
        """Update with the gradients here at each group's rate, and gather the weights; the gradients are gone then."""
        for group in self._zero.optimizer.param_groups:
            group["lr"] = rates[group["name"]]
        for index in range(len(self._flat)):
            self._zero.averaged_gradients[index] = [self._gradient(index)]
            self._gradients[index] = None
        self._zero.step()

    @torch.no_grad()
    def scale(self, scales: Mapping[str, Tensor | float]) -> None:
        """Multiply the gradients here by the factor of each parameter."""
        for name in self.parameters:
            self.part(name, "gradient").mul_(scales[name])

    def finish(self) -> None:
        """Wait for nothing: `step` has."""

    def discard(self) -> None:
        """Drop the gradients here."""
        self._gradients = [None] * len(self._gradients)

    def start_of(self, name: str) -> int:
        """Return where this replica's part of a parameter begins, in entries of the flattened parameter."""
        here = self.parameters[name]._hp_mapping
        return 0 if here is None else here.lp_fragment_address.start

    def part(self, name: str, key: str) -> Tensor:
        """Return this replica's part of a parameter's tensor: a view, maybe empty.

        The tensors are `weight`, `master`, `gradient`, `exp_avg` and `exp_avg_sq`.
        """
        index, here = self._group_of[name], self.parameters[name]._hp_mapping
        start, count = (0, 0) if here is None else (here.hp_fragment_address.start, here.hp_fragment_address.numel)
        if key == "weight":
            return self.parameters[name].detach().flatten().narrow(0, self.start_of(name), count)
        if key == "master":
            return self._flat[index].detach().narrow(0, start, count)
        flat = self._gradient(index) if key == "gradient" else self._state(name)[key]
        return flat.narrow(0, start, count)

    def step_of(self, name: str) -> Tensor:
        """Return the number of updates of a parameter, a view shared by all of its group."""
        return self._state(name)["step"]

    def _state(self, name: str) -> dict[str, Tensor]:
        return self._zero.optimizer.state[self._flat[self._group_of[name]]]

    def _gradient(self, index: int) -> Tensor:
        if self._gradients[index] is None:
            self._gradients[index] = torch.zeros_like(self._flat[index], requires_grad=False)
        return self._gradients[index]


def _zero_optimizer(
    parameters: Mapping[str, nn.Parameter],
    groups: Sequence[RuleGroup],
    eps: float,
    dp_group: dist.ProcessGroup,
):
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils.timer import NoopTimer

    # Without state: DeepSpeed puts flat shards in the place of the parameters.
    rule = torch.optim.AdamW([group.of(parameters) for group in groups], eps=eps, foreach=True)
    return DeepSpeedZeroOptimizer(
        rule,
        {parameter: name for name, parameter in parameters.items()},
        timers=NoopTimer(),
        optimizer_params=None,
        dp_process_group=dp_group,
        partition_grads=True,
        reduce_bucket_size=min(BUCKET_ELEMENTS, sum(parameter.numel() for parameter in parameters.values())),
        # A bucket lies in one shard or two: sent to these alone, not to all.
        use_multi_rank_bucket_allreduce=False,
        gradient_average=False,
        gradient_accumulation_dtype=torch.float32,
        communication_data_type=torch.float32,
        # Norms and clipping are the outer optimizer's.
        clip_grad=0.0,
        check_grad_overflow=False,
        compute_grad_norm=False,
    )
