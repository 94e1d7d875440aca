"""Text to tokens to batches: tokenizer, shards, sample order, loader, synthetic tasks."""
