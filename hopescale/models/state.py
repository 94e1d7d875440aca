"""What a model carries from one call to the next."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LayerState(NamedTuple):
    """Running state of one mixer.

    Attributes:
        position: Tokens read so far, equal for all sequences of the batch.
        tensors: Running values by name, batch first; float32 for memories.
    """

    position: int
    tensors: dict[str, Tensor]

    def detach(self) -> LayerState:
        """Cut the graph, keeping the values."""
        return LayerState(self.position, {name: tensor.detach() for name, tensor in self.tensors.items()})


class ModelState(NamedTuple):
    """Running state of a model: one `LayerState` per block."""

    layers: tuple[LayerState, ...]

    @property
    def position(self) -> int:
        """Tokens read so far."""
        return self.layers[0].position

    def detach(self) -> ModelState:
        """Cut the graph, keeping the values."""
        return ModelState(tuple(layer.detach() for layer in self.layers))
