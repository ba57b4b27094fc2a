"""Synthetic tones in the corpus layouts of all tasks, a few dozen short clips each."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

WORDS = ("down", "left", "no", "up")
EMOTIONS = ("ang", "hap", "neu", "sad")


def write_tone(
    path: Path, pitch: float, samples: int = 4800, rate: int = 16_000, channels: int = 1
) -> Path:
    """Write a tone with a little noise, and its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([round(pitch), samples, len(path.name), *path.name.encode()])
    tone = 0.3 * np.sin(2 * np.pi * pitch * np.arange(samples) / rate)
    sound = (tone + 0.02 * rng.standard_normal(samples))[:, None].repeat(channels, 1)
    soundfile.write(path, sound, rate, format="WAV", subtype="PCM_16")
    return path


def speech_commands(root: Path) -> Path:
    """Speech Commands: four words with four training, two validation and two test clips each."""
    lists: dict[str, list[str]] = {"validation": [], "testing": []}
    for place, word in enumerate(WORDS):
        for number in range(8):
            name = f"{word}/aa{number:02d}_nohash_0.wav"
            write_tone(root / name, 200 * (place + 1) + number, 4000 + 300 * number)
            if number >= 4:
                lists["validation" if number < 6 else "testing"].append(name)
    for kind, names in lists.items():
        (root / f"{kind}_list.txt").write_text("\n".join(names) + "\n")
    return root


def emotions(root: Path, speakers: int = 6) -> Path:
    """EmoDB: a table with every emotion once per speaker."""
    root.mkdir()
    with open(root / "labels.csv", "w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow(("path", "emotion", "speaker"))
        for speaker in range(speakers):
            for place, emotion in enumerate(EMOTIONS):
                name = f"wav/{speaker:02d}-{emotion}.wav"
                write_tone(root / name, 150 * (place + 1) + 10 * speaker)
                table.writerow((name, emotion, f"{speaker:02d}"))
    return root


def voices(root: Path) -> Path:
    """VoxCeleb1: three speakers to train on, two in the trials."""
    for place, name in enumerate(("id1", "id2", "id3", "id8", "id9")):
        for number in range(4):
            path = root / "wav" / name / f"video{number % 2}" / f"{number:05d}.wav"
            write_tone(path, 180 * (place + 1) + 5 * number, 5000 + 700 * number)
    files = [f"{name}/video{n % 2}/{n:05d}.wav" for name in ("id8", "id9") for n in range(3)]
    lines = [
        f"{int(first[:3] == second[:3])} {first} {second}"
        for place, first in enumerate(files)
        for second in files[place + 1 :]
    ]
    (root / "veri_test.txt").write_text("\n".join(lines) + "\n")
    return root


def transcripts(root: Path, subset: str, texts: Sequence[str], speaker: int = 7) -> Path:
    """LibriSpeech: utterances of a subset, 0.2 s per symbol."""
    folder = root / subset / str(speaker) / "1"
    for number, text in enumerate(texts):
        name = f"{speaker}-1-{number:04d}"
        write_tone(folder / f"{name}.flac", 300 + 40 * number, 3200 * max(1, len(text)))
        with open(folder / f"{speaker}-1.trans.txt", "a", encoding="utf-8") as stream:
            stream.write(f"{name} {text}\n")
    return root


def utterances(root: Path) -> Path:
    """LibriSpeech: the three subsets of speech recognition."""
    transcripts(root, "train-clean-100", ("A BAD CAB", "DAB", "A CAB", "BAD", "ADD A"))
    transcripts(root, "dev-clean", ("A BAD", "CAB"), 8)
    return transcripts(root, "test-clean", ("BAD DAB", "A CAD", "ACE"), 9)


def timers(root: Path) -> Path:
    """Timers and Such: a few commands per table."""
    semantics = "{'intent': 'SetTimer', 'slots': {'minutes': %d}}"
    spoken = {5: "five", 2: "two", 9: "nine"}
    for table in ("train-real", "train-synth", "dev-real", "test-real"):
        (root / table).mkdir(parents=True)
        with open(root / f"{table}.csv", "w", encoding="utf-8", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(("path", "speakerId", "transcription", "semantics"))
            for number, word in spoken.items():
                name = f"{table}/{number}.wav"
                write_tone(root / name, 100 * number, 16_000)
                rows.writerow((name, "ann", f"set {word} minutes", semantics % number))
    return root
