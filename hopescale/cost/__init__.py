"""Arithmetic on configs: parameters, FLOPs, hardware. Imports no torch."""
