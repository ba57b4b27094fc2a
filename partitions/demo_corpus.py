"""The demo corpus: over a hundred synthetic voices in LibriSpeech's layout, made by espeak-ng.

espeak-ng is licensed under GPL-3 and is an optional extra (`pip install shortwave[demo]`): it is
loaded only to make this corpus, and nothing else here needs it.
"""

import ctypes
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import IO, Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from common import atomic, command
from common.cache_folder import cache_folder
from common.errors import ShortwaveError, UsageError
from common.progress import track
from partitions.demo_text import sentence, transcript, words
from partitions.sampling import SAMPLE_RATE

VOICES = 112
"""Voices in the whole corpus."""

SUBSET = "train-demo"
"""The one subset of the corpus."""

_VERSION = 1
_COMPLETE = "COMPLETE"
_FIRST_SPEAKER = 1001
_CHAPTER = 1
_SECONDS_A_VOICE = 49.0
_SENTENCE = 5.5

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
# Voice variants that sound like a person; whispers and robots are left out.
_VARIANTS = words("""
m1 f1 m2 f2 m3 f3 m4 f4 m5 f5 m6 belinda m7 linda m8 anika adam steph antonio aunty benjamin grandma
boris steph2 robert shelby david steph3 ed klatt2 edward grandpa gustave klatt3 ian iven john klatt4
marcelo iven2 max klatt michel iven3 miguel norbert pablo paul pedro quincy rob sandro travis victor
edward2 mike2
""")


@dataclass(frozen=True)
class Voice:
    """One synthetic speaker; the numbers are espeak-ng's parameters."""

    speaker: str
    name: str
    """Accent and variant, as in `en-us+f3`."""
    pitch: int
    """0 to 99."""
    intonation: int
    """Range of the pitch, 0 to 99."""
    speed: int
    """Words a minute."""
    word_gap: int
    """Pause between words in steps of 10 ms."""


def demo_corpus(progress: bool = True, voices: int = VOICES) -> Path:
    """The root folder of the demo corpus, which is made first where the cache has none.

    It is made aside and takes its name only once complete, so that a build that was killed leaves
    nothing half-made, and processes that start together wait for one build. Builds on the same
    machine are byte-identical.

    Args:
        progress: show a progress bar on stderr where that is a terminal.
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
    """Whether a demo corpus is there with every file that its `COMPLETE` counts."""
    try:
        promised = json.loads((folder / _COMPLETE).read_text(encoding="utf-8"))
        sizes = [path.stat().st_size for path in folder.rglob("*.flac")]
        return bool([len(sizes), sum(sizes)] == [promised["utterances"], promised["audio bytes"]])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def voices_of(count: int) -> list[Voice]:
    """The first `count` voices, each a distinct combination of accent, variant and manner."""
    voices = []
    for index in range(count):
        again, rank = divmod(index, len(_VARIANTS))
        random = Random(f"demo voice {index}")
        accent = _ACCENTS[(rank + 3 * again) % len(_ACCENTS)]
        # The second voice of a variant is set apart by its pitch as well as by its accent.
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
    """Build in a process of its own: espeak-ng keeps state from voice to voice, and no threads."""
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
    digest = hashlib.sha256()
    samples: dict[str, int] = dict.fromkeys((voice.speaker for voice in voices), 0)
    sizes = []
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
                content = path.read_bytes()
                sizes.append(len(content))
                digest.update(name.encode() + hashlib.sha256(content).digest())
            transcripts = chapter / f"{voice.speaker}-{_CHAPTER}.trans.txt"
            transcripts.write_text("".join(lines), encoding="utf-8")
    (folder / "SPEAKERS.TXT").write_text(_speakers_text(voices, samples), encoding="utf-8")
    counts = {
        "version": _VERSION,
        "voices": count,
        "utterances": len(sizes),
        "seconds": round(sum(samples.values()) / SAMPLE_RATE, 3),
        "audio bytes": sum(sizes),
        "sha256": digest.hexdigest(),
    }
    (folder / _COMPLETE).write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")


def _speakers_text(voices: list[Voice], samples: dict[str, int]) -> str:
    """SPEAKERS.TXT in LibriSpeech's form."""
    lines = [";ID  |SEX| SUBSET           |MINUTES| NAME"]
    for voice in voices:
        sex = "F" if _sounds_female(voice.name.partition("+")[2]) else "M"
        minutes = samples[voice.speaker] / SAMPLE_RATE / 60
        lines.append(f"{voice.speaker} | {sex} | {SUBSET:16} | {minutes:.2f} | {voice.name}")
    return "\n".join(lines) + "\n"


def _sounds_female(variant: str) -> bool:
    women = ("anika", "aunty", "belinda", "grandma", "linda", "shelby")
    return variant.startswith(("f", "steph")) or variant in women


def _utterances(espeak: "Espeak", voice: Voice) -> Iterator[tuple[NDArray[np.float32], str]]:
    """The utterances of one voice with their transcripts, the same for the same voice."""
    random = Random(f"demo text {voice.speaker}")
    noise = np.random.Generator(np.random.PCG64(int(voice.speaker)))
    room = _room(noise)
    espeak.choose(voice)
    number = random.choice((4, 4, 5))
    for _ in range(number):
        target = _SECONDS_A_VOICE / number * random.uniform(0.93, 1.07)
        sentences: list[str] = []
        parts: list[NDArray[np.int16]] = []
        # Half a sentence short of the target, the next one would pass it as far as this one fails.
        while sum(map(len, parts)) / espeak.rate < target - _SENTENCE / 2:
            sentences.append(sentence(random))
            parts.append(espeak.say(sentences[-1]))
        clean = np.concatenate(parts).astype(np.float32) / 32768
        speech = soxr.resample(clean, espeak.rate, SAMPLE_RATE, quality="HQ")
        yield _record(speech, room, noise), transcript(sentences)


def _room(noise: np.random.Generator) -> NDArray[np.float32]:
    """A room's response: the direct sound and a faint tail that dies away."""
    decay = noise.uniform(0.02, 0.06)
    times = np.arange(int(0.3 * SAMPLE_RATE)) / SAMPLE_RATE
    tail = noise.standard_normal(len(times)) * np.exp(-times / decay)
    tail *= noise.uniform(0.1, 0.35) / np.linalg.norm(tail)
    tail[0] = 1.0
    return tail.astype(np.float32)


def _record(
    speech: NDArray[np.float32], room: NDArray[np.float32], noise: np.random.Generator
) -> NDArray[np.float32]:
    """Speech as a microphone in that room takes it, with noise 30 to 45 dB below it."""
    # Powers of two transform fast; other sizes take most of the build's time.
    size = 1 << (len(speech) + len(room) - 1).bit_length()
    whole = np.fft.irfft(np.fft.rfft(speech, size) * np.fft.rfft(room, size), size)
    wet = whole[: len(speech)]
    spectrum = np.fft.rfft(noise.standard_normal(size))
    # Room noise falls by 3 dB an octave.
    spectrum /= np.sqrt(np.arange(len(spectrum)) + 50.0)
    hiss = np.fft.irfft(spectrum, size)[: len(wet)]
    level = np.sqrt(np.mean(wet**2) / np.mean(hiss**2)) * 10 ** (-noise.uniform(30, 45) / 20)
    mixed = wet + level * hiss
    peak = noise.uniform(0.25, 0.75)
    return np.asarray(mixed * (peak / np.abs(mixed).max()), dtype=np.float32)


class Espeak:
    """espeak-ng through its C interface (speak_lib.h); one at a time in a process."""

    _SYNCHRONOUS = 2
    _BUFFER = 500
    _DO_NOT_EXIT = 0x8000
    _UTF8 = 1
    _RATE, _VOLUME, _PITCH, _RANGE, _WORD_GAP = 1, 2, 3, 4, 7
    # At the usual 100 the louder variants clip.
    _UNCLIPPED = 55
    # espeak-ng keeps its data path in 160 bytes.
    _LONGEST_PATH = 120

    def __init__(self) -> None:
        import espeakng_loader

        try:
            self._library: Any = ctypes.CDLL(espeakng_loader.get_library_path())
            data = str(espeakng_loader.get_data_path())
        except (OSError, RuntimeError) as error:
            raise UsageError(f"espeak-ng cannot be loaded: {error}") from None
        self._link = tempfile.TemporaryDirectory(prefix="shortwave-")
        if len(data) > self._LONGEST_PATH:
            short = os.path.join(self._link.name, "espeak-ng-data")
            os.symlink(data, short)
            data = short
        self.rate = self._library.espeak_Initialize(
            self._SYNCHRONOUS, self._BUFFER, data.encode(), self._DO_NOT_EXIT
        )
        if self.rate <= 0:
            raise UsageError(f"espeak-ng does not start with its data in {data}")
        self._system = ctypes.CDLL(None)
        self._chunks: list[bytes] = []
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
        self._callback = kind(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def __enter__(self) -> "Espeak":
        return self

    def __exit__(self, *_: object) -> None:
        self._library.espeak_Terminate()
        self._link.cleanup()

    def _receive(self, samples: int | None, count: int, _events: int | None) -> int:
        if samples and count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    def choose(self, voice: Voice) -> None:
        """Take a voice.

        Raises:
            UsageError: this build of espeak-ng has no such voice.
        """
        if self._library.espeak_SetVoiceByName(voice.name.encode()):
            raise UsageError(f"this espeak-ng has no voice {voice.name}")
        # Breath and other noise are drawn from the system's rand() and from espeak-ng's own
        # generator, which starts from the time of day.
        self._system.srand(int(voice.speaker))
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(int(voice.speaker)))
        for parameter, value in (
            (self._RATE, voice.speed),
            (self._VOLUME, self._UNCLIPPED),
            (self._PITCH, voice.pitch),
            (self._RANGE, voice.intonation),
            (self._WORD_GAP, voice.word_gap),
        ):
            self._library.espeak_SetParameter(parameter, value, 0)

    def say(self, text: str) -> NDArray[np.int16]:
        """Speech as int16 [samples] at `rate`."""
        self._chunks.clear()
        content = text.encode()
        size = ctypes.c_size_t(len(content) + 1)
        none = ctypes.c_void_p(None)
        failed = self._library.espeak_Synth(content, size, 0, 0, 0, self._UTF8, none, none)
        if failed or self._library.espeak_Synchronize() or not self._chunks:
            raise ShortwaveError(f"espeak-ng could not say '{text}'")
        return np.frombuffer(b"".join(self._chunks), dtype=np.int16)


def _main(arguments: Sequence[str] | None) -> None:
    folder, count, show = arguments or sys.argv[1:]
    _build(Path(folder), int(count), show == "progress")


if __name__ == "__main__":
    command.run(_main)
