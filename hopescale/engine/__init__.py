"""One training step: forward, backward, cadence, clip, update."""

from hopescale.engine.schedule import make_passes
from hopescale.engine.step import Computed, Engine, Gradients

__all__ = ["Computed", "Engine", "Gradients", "make_passes"]
