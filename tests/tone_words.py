"""Words that are tones, in Speech Commands' layout, and a backbone small enough to hear them."""

from pathlib import Path

import numpy as np
import soundfile
import torch

from ssl_core.training import hf_checkpoint as hf
from ssl_core.wav2vec2.config import ModelConfig
from ssl_core.wav2vec2.model import PretrainingModel

WORDS = ("follow", "marvin", "sheila", "visual")
SPEAKERS = ("aa00c1e7", "bb11d2f8", "cc22e3a9", "dd33f4ba", "ee44a5cb", "ff55b6dc")
SAMPLES = 4800
SMALL = ModelConfig(
    feat_extract_norm="layer",
    conv_bias=True,
    do_stable_layer_norm=True,
    conv_dim=(16,) * 7,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
    codevector_dim=16,
    proj_codevector_dim=16,
    num_codevectors_per_group=8,
    hidden_dropout=0.1,
    layerdrop=0.0,
)
"""Of a few thousand weights, with dropout."""


def write_tone(path: Path, word: int, chance: int, samples: int = SAMPLES) -> None:
    """A word's tone, at a phase of its own, in faint noise."""
    rng = np.random.default_rng(chance)
    angle = 2 * np.pi * (300 * 2**word * np.arange(samples) / 16_000 + rng.uniform())
    sound = 0.3 * np.sin(angle) + 0.003 * rng.standard_normal(samples)
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, sound, 16_000, subtype="PCM_16")


def write_words(root: Path, speakers: tuple[str, ...] = SPEAKERS, times: int = 2) -> Path:
    """Each speaker says each word so many times; the last two speakers are the official lists."""
    clips = [
        (f"{word}/{speaker}_nohash_{time}.wav", place)
        for place, word in enumerate(WORDS)
        for speaker in speakers
        for time in range(times)
    ]
    for chance, (path, place) in enumerate(clips):
        write_tone(root / path, place, chance)
    for name, speaker in zip(("validation", "testing"), speakers[-2:], strict=True):
        lines = [path for path, _ in clips if f"/{speaker}_" in path]
        (root / f"{name}_list.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def write_backbone(folder: Path, seed: int = 0) -> Path:
    """A checkpoint as pretraining leaves it."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    weights = {name: v.detach() for name, v in PretrainingModel(SMALL).state_dict().items()}
    hf.save_model(folder, SMALL, weights)
    return folder
