"""The one sampling rate of this project."""

SAMPLE_RATE = 16_000
"""Samples a second of every waveform the model sees (wav2vec 2.0, section 4.1)."""
