"""Generated tasks whose answers are known: training data and evaluation of memory, state and continual learning."""
