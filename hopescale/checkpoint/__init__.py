"""When the state of a run is saved, how, and what is kept."""
