"""What a run tells: metrics, trackers, the console line, throughput, health. Measures; never decides a step."""
