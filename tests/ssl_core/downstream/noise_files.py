"""Noise files in the layouts of corpora, and the recordings beside the checkout."""

from pathlib import Path

import numpy as np
import pytest
import soundfile


def write_noise(path: Path, samples: int = 1600, rate: int = 16_000) -> Path:
    """Write a noise file and its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(samples).uniform(-0.5, 0.5, samples)
    soundfile.write(path, noise, rate, subtype="PCM_16")
    return path


def real_data(name: str) -> Path:
    """A folder of real recordings; skips the test if it is missing."""
    folder = Path(__file__).parents[3].parent / "shared" / "data" / name
    if not folder.is_dir():
        pytest.skip(f"no real recordings in ../shared/data/{name}")
    return folder
