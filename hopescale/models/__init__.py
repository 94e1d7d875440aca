"""The model: memories, mixers, levels, blocks. Knows tensors and parallel layers, no optimizer and no trainer."""

from hopescale.models.handover import Handover
from hopescale.models.model import Model, level_of
from hopescale.models.state import LayerState, ModelState

__all__ = ["Handover", "LayerState", "Model", "ModelState", "level_of"]
