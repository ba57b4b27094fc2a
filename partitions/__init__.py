"""What is on disk: corpora, recutting to a length, speaker partitions. No torch, flwr or ray."""
