"""Scaling laws: fitted to tables of runs, compared, drawn, and asked for the best size. Imports no torch."""
