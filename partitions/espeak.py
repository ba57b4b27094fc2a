"""Synthesises speech with espeak-ng through its C interface."""

import ctypes
import os
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ShortwaveError, UsageError


@dataclass(frozen=True)
class Voice:
    """A synthetic speaker, with espeak-ng's parameters."""

    speaker: str
    """The number of the speaker, which is also the seed of the voice's noise."""
    name: str
    """Accent and variant, as in `en-us+f3`."""
    pitch: int
    """Base pitch, 0 to 99."""
    intonation: int
    """Pitch range, 0 to 99."""
    speed: int
    """Words per minute."""
    word_gap: int
    """Pause between words in steps of 10 ms."""


class Espeak:
    """espeak-ng through its C interface (speak_lib.h); a process can have one at a time.

    Attributes:
        rate: sampling rate of the speech in Hz.
    """

    _SYNCHRONOUS = 2
    _BUFFER = 500
    _DO_NOT_EXIT = 0x8000
    _UTF8 = 1
    _RATE, _VOLUME, _PITCH, _RANGE, _WORD_GAP = 1, 2, 3, 4, 7
    # The louder variants clip at the default of 100.
    _UNCLIPPED = 55
    # espeak-ng stores its data path in 160 bytes.
    _LONGEST_PATH = 120

    def __init__(self) -> None:
        """Load and initialise espeak-ng.

        Raises:
            UsageError: the library or its data cannot be loaded.
        """
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
            raise UsageError(f"espeak-ng cannot be initialised with its data in {data}")
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
        """Callback: collect `count` int16 samples at the address `samples`."""
        if samples and count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    def choose(self, voice: Voice) -> None:
        """Select a voice and seed its noise.

        Raises:
            UsageError: this build of espeak-ng has no such voice.
        """
        if self._library.espeak_SetVoiceByName(voice.name.encode()):
            raise UsageError(f"this espeak-ng has no voice {voice.name}")
        # Breath and other noise come from the C library's rand() and from espeak-ng's own
        # generator, which by default is seeded with the time of day.
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
        """Synthesise a text; returns int16 `[sample]` at `rate`.

        Raises:
            ShortwaveError: espeak-ng failed.
        """
        self._chunks.clear()
        content = text.encode()
        size = ctypes.c_size_t(len(content) + 1)
        none = ctypes.c_void_p(None)
        failed = self._library.espeak_Synth(content, size, 0, 0, 0, self._UTF8, none, none)
        if failed or self._library.espeak_Synchronize() or not self._chunks:
            raise ShortwaveError(f"espeak-ng could not say '{text}'")
        return np.frombuffer(b"".join(self._chunks), dtype=np.int16)
