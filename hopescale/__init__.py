"""hopescale: train Hope language models (Nested Learning) on one process or many."""

__version__ = "0.1.0"
