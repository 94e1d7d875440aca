"""What a model knows: tasks of lm-eval, and the loss on held-out shards; from checkpoints and exports alike."""
