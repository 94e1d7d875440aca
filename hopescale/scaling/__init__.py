"""Laws of loss from tables of runs: fits, intervals, comparisons, plots. Imports no torch and starts no run."""
