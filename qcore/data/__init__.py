"""Data-set cards (YAML) and the samples they describe, streamed in batches."""
