"""Serving a model over HTTP: sequences that are written side by side, and contexts that are read once."""
