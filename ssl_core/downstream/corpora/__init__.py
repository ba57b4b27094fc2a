"""Readers of the corpora of downstream tasks, with the paper's splits."""
