"""Generation from a carried state."""
