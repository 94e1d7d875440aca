"""Sweeps: trials made, run and collected; laws of loss fitted to tables of runs and drawn. Imports no torch."""
