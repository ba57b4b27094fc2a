"""Corpora on disk, recutting to a length and speaker partitions. No torch, flwr or ray."""
