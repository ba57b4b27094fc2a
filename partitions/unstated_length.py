"""Opens and reads audio whose header does not state its length, as it is streamed to a pipe.

FLAC may leave the number of samples at 0: libsndfile then says 2**63 - 1, and an error follows
every read that takes the last sample, although it was read. WAV may leave the length of its data at
0: libsndfile then finds no samples. Other lengths of streamed WAV, such as 2**32 - 1, it corrects.
"""

import io
import struct
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

_LONGEST = 2**40
"""More frames than a file can have."""
_BLOCK = 2**16
"""Frames decoded at a time to count them."""
_AT_END = 39
"""libsndfile's code for a seek that failed: python-soundfile seeks to where a read ended."""


def is_stated(sound: soundfile.SoundFile) -> bool:
    """Whether the header says how many frames there are."""
    return 0 <= int(sound.frames) <= _LONGEST


def frames_of(sound: soundfile.SoundFile) -> int:
    """Number of frames by the header, or else counted by decoding all; `sound` is then at its end.

    Raises:
        SoundFileError: the file is damaged.
    """
    if is_stated(sound):
        return int(sound.frames)
    total = 0
    while True:
        found = len(read_frames(sound, total, _BLOCK))
        total += found
        if found < _BLOCK:
            return total


def read_frames(sound: soundfile.SoundFile, start: int, count: int) -> NDArray[np.float32]:
    """Read frames as float32 `[frame, channel]`; fewer than `count` at the file's end.

    Args:
        sound: an open file; one that does not state its length must be opened again after a read
            that reached its end.
        start: first frame.
        count: number of frames.

    Raises:
        SoundFileError: the file is damaged, or ends before `start` as its header has it.
    """
    if is_stated(sound):
        sound.seek(start)
        return sound.read(count, dtype="float32", always_2d=True)
    # What was read before an error stays in `out`; integers never decode to NaN.
    out = np.full((count, sound.channels), np.nan, dtype=np.float32)
    try:
        sound.seek(start)
        sound.read(out=out)
    except soundfile.LibsndfileError as error:
        if error.code != _AT_END:
            raise
    missing = np.isnan(out[:, 0])
    return out[: int(missing.argmax())] if missing.any() else out


def open_sound(path: Path) -> soundfile.SoundFile:
    """Open an audio file; a WAV file whose data have no length is read to its end.

    Raises:
        SoundFileError: not audio.
        OSError: the file cannot be read.
    """
    sound = soundfile.SoundFile(path)
    if sound.frames or sound.format not in ("WAV", "WAVEX"):
        return sound
    place = _unstated_field(path)
    if place is None:
        return sound
    sound.close()
    return _StreamedWav(path, place)


def _unstated_field(path: Path) -> int | None:
    """First byte of the length 0 of a WAV file's data; None if there are no data after it."""
    size = path.stat().st_size
    with open(path, "rb") as stream:
        place, field = 12, None
        while place + 8 <= size:
            stream.seek(place)
            name, length = struct.unpack("<4sI", stream.read(8))
            if name == b"data" and not length and field is None:
                field = place + 4
            place += 8 + length + length % 2
    # Chunks that end where the file does follow data that are really empty.
    return None if place == size else field


class _StreamedWav(soundfile.SoundFile):
    """A WAV file, read as if the length of its data were the greatest."""

    def __init__(self, path: Path, place: int) -> None:
        self._stream = _Replaced(path, place)
        super().__init__(self._stream)

    def close(self) -> None:
        super().close()
        self._stream.close()


class _Replaced(io.FileIO):
    """A file with 255 in the four bytes from `place` on."""

    def __init__(self, path: Path, place: int) -> None:
        super().__init__(path)
        self._place = place

    def readinto(self, buffer: "memoryview[int]") -> int:  # type: ignore[override]
        start = self.tell()
        count = super().readinto(buffer)
        view = memoryview(buffer)
        for place in range(max(self._place, start), min(self._place + 4, start + count)):
            view[place - start : place - start + 1] = b"\xff"
        return count
