"""The sampling rate of the project."""

SAMPLE_RATE = 16_000
"""Samples per second of the model's input (wav2vec 2.0, section 4.1)."""
