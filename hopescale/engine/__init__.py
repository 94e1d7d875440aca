"""One training step: forward, backward, cadence, clip, update."""
