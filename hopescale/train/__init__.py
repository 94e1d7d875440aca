"""The trainer: one loop, its state, its stops."""
