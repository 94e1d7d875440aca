"""One training step: forward, backward, cadence, clip, update."""

from hopescale.engine.schedule import make_passes
from hopescale.engine.step import Engine, Gradients

__all__ = ["Engine", "Gradients", "make_passes"]
