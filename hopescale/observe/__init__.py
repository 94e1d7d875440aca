"""Observation of a run: metrics, trackers, the console line, throughput, health. Measures; never decides a step."""
