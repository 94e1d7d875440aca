"""Weights of blocks that replicas of a node share out, gathered around the passes of each block."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hopescale.models import Model
from hopescale.models.init import initial_values
from hopescale.parallel.deferred import defer
from hopescale.parallel.node_flat import NodeFlat


class NodeWeights:
    """Gathers a block's weights before it runs, forward and backward, and frees them when it is done.

    The gather of the next block of a pass begins before a block computes, so that two are whole at a time. The last
    block's weights stay from its forward to its backward pass. A block is done with its backward pass when the
    gradients of its input and of all its parameters have come; what is left is freed at the end of the backward pass.
    What is computed again in a backward pass finds the weights that this pass needs.

    Args:
        blocks: Blocks in the order in which they run, each once in a forward pass.
        flats: Weights of each block.
    """

    def __init__(self, blocks: Sequence[nn.Module], flats: Sequence[Sequence[NodeFlat]]):
        self._flats, self._last = [list(each) for each in flats], len(blocks) - 1
        self._parameters = [set(block.parameters()) for block in blocks]
        self._missing: list[set[nn.Parameter]] = [set() for _ in blocks]
        self._waits_for_input = [False] * len(blocks)
        self._is_backward = False
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._before_forward, number))
            block.register_forward_hook(partial(self._after_forward, number))
            for parameter in self._parameters[number]:
                parameter.register_post_accumulate_grad_hook(partial(self._arrive, number))

    def _before_forward(self, number: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if number == 0 and inputs[0].requires_grad:
            inputs[0].register_hook(partial(self._leave, number))
        self._gather(number, number + 1)

    def _after_forward(self, number: int, _: nn.Module, __: tuple, outputs: tuple[Tensor, object]) -> None:
        if outputs[0].requires_grad:
            outputs[0].register_hook(partial(self._before_backward, number))
            if number == self._last:
                return
        self._free(number)

    def _before_backward(self, number: int, _: Tensor) -> None:
        if not self._is_backward:
            self._is_backward = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        if number < self._last:
            self._leave(number + 1)
        self._missing[number], self._waits_for_input[number] = set(self._parameters[number]), True
        self._gather(number, number - 1)

    def _leave(self, number: int, _: Tensor | None = None) -> None:
        """Note that the gradient of a block's input is there."""
        self._waits_for_input[number] = False
        self._free_if_done(number)

    def _arrive(self, number: int, parameter: nn.Parameter) -> None:
        """Note that the gradient of a parameter is there."""
        self._missing[number].discard(parameter)
        self._free_if_done(number)

    def _free_if_done(self, number: int) -> None:
        if not (self._missing[number] or self._waits_for_input[number]):
            self._free(number)

    def _end_backward(self) -> None:
        self._is_backward = False
        for number in range(len(self._flats)):
            self._free(number)

    def _gather(self, number: int, following: int) -> None:
        """Make a block's weights whole, and begin to make those of the following one, if there is one."""
        for flat in self._flats[number]:
            flat.begin_to_gather()
        for flat in self._flats[number]:
            flat.wait()
        if 0 <= following <= self._last:
            for flat in self._flats[following]:
                flat.begin_to_gather()

    def _free(self, number: int) -> None:
        for flat in self._flats[number]:
            flat.free()


def defer_blocks(model: Model, dtype: torch.dtype, device: torch.device, seed: int | None) -> None:
    """Let the weights of blocks wait for the flat tensors that share them out, so that no rank ever holds all of them.

    Args:
        model: Model that has not been initialised.
        dtype: Type of weights that do not stay float32.
        device: Device of this rank.
        seed: Seed of their initial values; None if a checkpoint will set them.
    """
    for number, block in model.blocks.items():
        for name, parameter in block.named_parameters(prefix=f"blocks.{number}"):
            draw = None if seed is None else partial(initial_values, name, parameter, seed, model.mesh)
            defer(parameter, torch.float32 if parameter.spec.keep_fp32 else dtype, device, draw)


def gather_blocks(blocks: dict[str, nn.Module], flats: Sequence[tuple[str, NodeFlat]]) -> None:
    """Let blocks find their weights whole when they run, if any are shared out.

    Args:
        blocks: Blocks by the prefix of the names of their parameters, in the order in which they run.
        flats: Weights that replicas of a node share out, each with the name of a parameter in it.
    """
    if flats:
        of_blocks = [[flat for name, flat in flats if name.startswith(prefix)] for prefix in blocks]
        NodeWeights(list(blocks.values()), of_blocks)  # hooks of the blocks hold it
