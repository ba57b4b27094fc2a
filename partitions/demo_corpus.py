"""Builds the demo corpus: over a hundred espeak-ng voices in LibriSpeech's layout.

espeak-ng is licensed under GPL-3 and is an optional extra (`pip install shortwave[demo]`), needed
only to build this corpus.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import IO

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from common import atomic, command
from common.cache_folder import cache_folder
from common.errors import ShortwaveError, UsageError
from common.progress import track
from partitions.demo_text import sentence, transcript, words
from partitions.espeak import Espeak, Voice
from partitions.file_contents import digest_of
from partitions.fingerprints import contents, fingerprints
from partitions.sampling import SAMPLE_RATE

VOICES = 112
"""Number of voices in the full corpus."""

SUBSET = "train-demo"
"""The only subset of the corpus."""

_VERSION = 1
_COMPLETE = "COMPLETE"
_FIRST_SPEAKER = 1001
_CHAPTER = 1
_SECONDS_PER_VOICE = 49.0
_SENTENCE = 5.5
"""Typical length of a sentence in seconds."""

_ACCENTS = (
    "en-us",
    "en-gb-scotland",
    "en-029",
    "en-gb-x-rp",
    "en-us-nyc",
    "en-gb-x-gbclan",
    "en",
    "en-gb-x-gbcwmd",
)
# The voice variants that sound like a person, without whispers and robots.
_VARIANTS = words("""
m1 f1 m2 f2 m3 f3 m4 f4 m5 f5 m6 belinda m7 linda m8 anika adam steph antonio aunty benjamin grandma
boris steph2 robert shelby david steph3 ed klatt2 edward grandpa gustave klatt3 ian iven john klatt4
marcelo iven2 max klatt michel iven3 miguel norbert pablo paul pedro quincy rob sandro travis victor
edward2 mike2
""")


def demo_corpus(progress: bool = True, voices: int = VOICES) -> Path:
    """The root folder of the demo corpus, which is built if the cache does not have it.

    The build is atomic: a killed build leaves no partial corpus, and concurrent processes wait for
    one build. Builds on the same machine are byte-identical.

    Args:
        progress: show a progress bar on stderr if that is a terminal.
        voices: number of voices, from 1 to 112.

    Raises:
        UsageError: espeakng-loader is not installed or does not work here.
        ShortwaveError: the build failed.
        OSError: the disk is full or the cache folder cannot be written.
    """
    if not 1 <= voices <= VOICES:
        raise UsageError(f"the demo corpus has 1 to {VOICES} voices, not {voices}")
    name = f"demo-corpus-v{_VERSION}" + ("" if voices == VOICES else f"-{voices}")
    folder = cache_folder() / name
    if is_complete(folder):
        return folder
    if importlib.util.find_spec("espeakng_loader") is None:
        raise UsageError(
            "the demo corpus needs espeak-ng: pip install shortwave[demo], "
            "or give a corpus of your own with --data DIR"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_complete(folder):
            for stale in folder.parent.glob(f".{name}.*.partial"):
                shutil.rmtree(stale, ignore_errors=True)
            with atomic.directory(folder) as partial:
                _build_in_child(partial, voices, progress, lock)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether a demo corpus exists with the audio that its `COMPLETE` states, and no other."""
    try:
        expected = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
        files = _files(folder)
        if "content" not in expected:  # made by version 0.1
            return bool(files and _sha256(folder, files) == expected["sha256"])
        return bool(digest_of(contents(fingerprints(folder, files))) == expected["content"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _files(folder: Path) -> list[str]:
    """Paths of all utterances, in order."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.flac"))


def _sha256(folder: Path, files: Iterable[str]) -> str:
    """Digest of the names and bytes of utterances."""
    digest = hashlib.sha256()
    for file in files:
        path = folder / file
        digest.update(path.stem.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def voices_of(count: int) -> list[Voice]:
    """The first `count` voices, each a distinct combination of accent, variant and prosody."""
    voices = []
    for index in range(count):
        again, rank = divmod(index, len(_VARIANTS))
        random = Random(f"demo voice {index}")
        accent = _ACCENTS[(rank + 3 * again) % len(_ACCENTS)]
        # The two voices of a variant differ in pitch as well as in accent.
        lowest = (25, 60)[(rank + again) % 2]
        voices.append(
            Voice(
                speaker=str(_FIRST_SPEAKER + index),
                name=f"{accent}+{_VARIANTS[rank]}",
                pitch=random.randint(lowest, lowest + 20),
                intonation=random.randint(30, 80),
                speed=random.randint(135, 195),
                word_gap=random.randint(0, 4),
            )
        )
    return voices


def _build_in_child(folder: Path, voices: int, progress: bool, lock: IO[str]) -> None:
    """Build in a child process, because espeak-ng keeps global state and is not thread-safe."""
    home = str(Path(__file__).resolve().parents[1])
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    arguments = [str(folder), str(voices), "progress" if progress else "quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "partitions.demo_corpus", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode == UsageError.exit_code:
        raise UsageError("espeak-ng does not work here; give a corpus of your own with --data DIR")
    if done.returncode:
        raise ShortwaveError(
            f"making the demo corpus failed (code {done.returncode}); see the line above, or give "
            f"a corpus of your own with --data DIR"
        )


def _build(folder: Path, count: int, progress: bool) -> None:
    parent = os.getppid()
    voices = voices_of(count)
    samples: dict[str, int] = dict.fromkeys((voice.speaker for voice in voices), 0)
    with Espeak() as espeak:
        for voice in track(voices, count, "Making the demo corpus", progress):
            if os.getppid() != parent:
                raise ShortwaveError("the process that wanted the demo corpus is gone")
            chapter = folder / SUBSET / voice.speaker / str(_CHAPTER)
            chapter.mkdir(parents=True)
            lines = []
            for number, (audio, spoken) in enumerate(_utterances(espeak, voice)):
                name = f"{voice.speaker}-{_CHAPTER}-{number:04d}"
                path = chapter / f"{name}.flac"
                soundfile.write(path, audio, SAMPLE_RATE, subtype="PCM_16")
                lines.append(f"{name} {spoken}\n")
                samples[voice.speaker] += len(audio)
            transcripts = chapter / f"{voice.speaker}-{_CHAPTER}.trans.txt"
            transcripts.write_text("".join(lines), encoding="utf-8")
    (folder / "SPEAKERS.TXT").write_text(_speakers_text(voices, samples), encoding="utf-8")
    files = _files(folder)
    counts = {
        "version": _VERSION,
        "voices": count,
        "utterances": len(files),
        "seconds": round(sum(samples.values()) / SAMPLE_RATE, 3),
        "audio bytes": sum((folder / file).stat().st_size for file in files),
        "sha256": _sha256(folder, files),
        "content": digest_of(contents(fingerprints(folder, files))),
    }
    (folder / _COMPLETE).write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")


def _speakers_text(voices: list[Voice], samples: dict[str, int]) -> str:
    """Content of SPEAKERS.TXT in LibriSpeech's form."""
    lines = [";ID  |SEX| SUBSET           |MINUTES| NAME"]
    for voice in voices:
        sex = "F" if _sounds_female(voice.name.partition("+")[2]) else "M"
        minutes = samples[voice.speaker] / SAMPLE_RATE / 60
        lines.append(f"{voice.speaker} | {sex} | {SUBSET:16} | {minutes:.2f} | {voice.name}")
    return "\n".join(lines) + "\n"


def _sounds_female(variant: str) -> bool:
    women = ("anika", "aunty", "belinda", "grandma", "linda", "shelby")
    return variant.startswith(("f", "steph")) or variant in women


def _utterances(espeak: Espeak, voice: Voice) -> Iterator[tuple[NDArray[np.float32], str]]:
    """Utterances of a voice, `[sample]` at 16 kHz, with transcripts; the voice is the seed."""
    random = Random(f"demo text {voice.speaker}")
    noise = np.random.Generator(np.random.PCG64(int(voice.speaker)))
    room = _room(noise)
    espeak.choose(voice)
    number = random.choice((4, 4, 5))
    for _ in range(number):
        target = _SECONDS_PER_VOICE / number * random.uniform(0.93, 1.07)
        sentences: list[str] = []
        parts: list[NDArray[np.int16]] = []
        # With less than half a sentence missing, another one would overshoot by more than that.
        while sum(map(len, parts)) / espeak.rate < target - _SENTENCE / 2:
            sentences.append(sentence(random))
            parts.append(espeak.say(sentences[-1]))
        clean = np.concatenate(parts).astype(np.float32) / 32768
        speech = soxr.resample(clean, espeak.rate, SAMPLE_RATE, quality="HQ")
        yield _record(speech, room, noise), transcript(sentences)


def _room(noise: np.random.Generator) -> NDArray[np.float32]:
    """Impulse response of a room, `[tap]`: direct sound and a faint decaying tail."""
    decay = noise.uniform(0.02, 0.06)
    times = np.arange(int(0.3 * SAMPLE_RATE)) / SAMPLE_RATE
    tail = noise.standard_normal(len(times)) * np.exp(-times / decay)
    tail *= noise.uniform(0.1, 0.35) / np.linalg.norm(tail)
    tail[0] = 1.0
    return tail.astype(np.float32)


def _record(
    speech: NDArray[np.float32], room: NDArray[np.float32], noise: np.random.Generator
) -> NDArray[np.float32]:
    """Speech `[sample]` recorded in a room, with noise at an SNR of 30 to 45 dB."""
    # The FFT is fast for powers of two; with other sizes it takes most of the build's time.
    size = 1 << (len(speech) + len(room) - 1).bit_length()
    whole = np.fft.irfft(np.fft.rfft(speech, size) * np.fft.rfft(room, size), size)
    wet = whole[: len(speech)]
    spectrum = np.fft.rfft(noise.standard_normal(size))
    # Room noise falls by 3 dB per octave.
    spectrum /= np.sqrt(np.arange(len(spectrum)) + 50.0)
    hiss = np.fft.irfft(spectrum, size)[: len(wet)]
    level = np.sqrt(np.mean(wet**2) / np.mean(hiss**2)) * 10 ** (-noise.uniform(30, 45) / 20)
    mixed = wet + level * hiss
    peak = noise.uniform(0.25, 0.75)
    return np.asarray(mixed * (peak / np.abs(mixed).max()), dtype=np.float32)


def _main(arguments: Sequence[str] | None) -> None:
    folder, count, show = arguments or sys.argv[1:]
    _build(Path(folder), int(count), show == "progress")


if __name__ == "__main__":
    command.run(_main)
