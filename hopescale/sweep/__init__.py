"""Sweeps: trials declared in one file, run as processes or jobs, followed and collected. Imports no torch."""
