"""Readers of the corpora that downstream tasks use, with the splits of the paper."""
