"""Evaluation of checkpoints and exports: tasks of lm-eval, suites, and the loss on held-out shards."""
