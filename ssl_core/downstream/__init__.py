"""Downstream tasks: corpora, heads, metrics, and fine-tuning on a frozen or trained backbone."""
