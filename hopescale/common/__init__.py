"""Helpers that every floor may use: errors, logging, units, paths. Imports nothing else of hopescale, and no torch."""
