"""One training step: forward, backward, cadence, clip, update."""

from hopescale.engine.step import Engine, Gradients

__all__ = ["Engine", "Gradients"]
