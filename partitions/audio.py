"""Reads the samples of a crop, decoding only the part of each file that the crop needs."""

import math
import os
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from common.errors import DataError, UsageError
from partitions.flac_header import flac_length
from partitions.manifest import Piece, Sequence, path_problem
from partitions.sampling import SAMPLE_RATE
from partitions.unstated_length import frames_of, is_stated, open_sound, read_frames

SILENCE = 1e-5
"""RMS below which a crop counts as silent; full scale is 1, one 16-bit step is 3e-5."""

_MARGIN = 0.025
"""Seconds decoded on each side of a piece to resample; longer than soxr's filter."""

_PADDING = 2
"""Samples that may be missing at a file's end after resampling, because of rounding."""


class BadAudio(DataError):
    """Unusable audio, with the reason.

    Attributes:
        reason: "missing", "unreadable", "truncated", "not finite", "silent" or "empty".
        path: path of the file, relative to the corpus root.
    """

    def __init__(self, reason: str, path: str, detail: str) -> None:
        """Build the message from the path and the detail.

        Args:
            reason: one of the reasons of the class.
            path: path of the file, relative to the corpus root.
            detail: what is wrong with the file and what to do.
        """
        super().__init__(f"{path}: {detail}")
        self.reason = reason
        self.path = path

    def __reduce__(self) -> tuple[type["BadAudio"], tuple[str, str, str]]:
        """Pickle all three arguments, so that the error can be sent between processes."""
        detail = str(self).removeprefix(f"{self.path}: ")
        return BadAudio, (self.reason, self.path, detail)


def samples_of(path: str | Path) -> int | str:
    """Length in samples at 16 kHz according to the file's header.

    Only a file whose header does not state it is decoded, to count its samples.

    Returns:
        The number of samples, or the reason why the file is unusable: "missing", "unreadable" or
        "empty".
    """
    try:
        stated = flac_length(path) if str(path).lower().endswith(".flac") else None
        if stated is not None:
            frames, rate = stated
        elif os.stat(path).st_size == 0:
            return "empty"
        else:
            with open_sound(Path(path)) as sound:
                frames, rate = frames_of(sound), int(sound.samplerate)
    except (FileNotFoundError, NotADirectoryError):
        return "missing"
    except (soundfile.SoundFileError, OSError):
        return "unreadable"
    return frames * SAMPLE_RATE // rate or "empty"


def read_crop(
    root: Path, sequence: Sequence, offset: int = 0, samples: int | None = None
) -> NDArray[np.float32]:
    """Read a crop of a sequence as float32 `[sample]` at 16 kHz.

    Args:
        root: the corpus root.
        sequence: the sequence to crop.
        offset: first sample of the crop, at 16 kHz.
        samples: length of the crop in samples at 16 kHz; None means up to the sequence's end.

    Raises:
        BadAudio: a file is missing, unreadable, truncated or empty, or the crop holds NaN or
            infinite samples or only silence.
        UsageError: the crop is not within the sequence.
    """
    total = sequence.samples
    end = total if samples is None else offset + samples
    if not 0 <= offset < end <= total:
        raise UsageError(
            f"a crop of samples {offset} to {end} does not lie in a sequence of {total} samples"
        )
    parts = []
    position = 0
    for piece in sequence.pieces:
        first = max(offset - position, 0)
        last = min(end - position, piece.samples)
        if first < last:
            parts.append(read_piece(root, Piece(piece.path, piece.start + first, last - first)))
        position += piece.samples
    crop = np.concatenate(parts) if len(parts) > 1 else parts[0]
    if math.sqrt(float(np.mean(np.square(crop, dtype=np.float64)))) < SILENCE:
        raise BadAudio("silent", sequence.pieces[0].path, "the crop holds only silence")
    return crop


def read_piece(root: Path, piece: Piece) -> NDArray[np.float32]:
    """Read a piece as float32 `[sample]` at 16 kHz, mixed to mono and resampled if needed.

    Raises:
        BadAudio: the file is missing, unreadable, truncated or empty, or the piece holds NaN or
            infinite samples.
        UsageError: the path leads outside the root, or the position or length is invalid.
    """
    problem = path_problem(piece.path)
    if problem or piece.start < 0 or piece.samples < 1:
        raise UsageError(f"cannot read {piece}: {problem or 'it holds no samples'}")
    path = root / piece.path
    try:
        if path.stat().st_size == 0:
            raise BadAudio("empty", piece.path, "an empty file; download it again")
    except OSError as error:
        raise BadAudio("missing", piece.path, f"{error.strerror} in {root}") from None
    try:
        sound = open_sound(path)
    except (soundfile.SoundFileError, OSError) as error:
        raise BadAudio("unreadable", piece.path, f"cannot be decoded ({_cause(error)})") from None
    with sound:
        if sound.frames < 1:
            raise BadAudio("empty", piece.path, "an audio file without samples")
        if sound.samplerate == SAMPLE_RATE:
            audio = _decode(sound, piece, piece.start, piece.start + piece.samples)
        else:
            audio = _resample(sound, piece)
    if not np.isfinite(audio).all():
        raise BadAudio("not finite", piece.path, "holds NaN or infinite samples")
    return audio


def _decode(
    sound: soundfile.SoundFile, piece: Piece, start: int, end: int, whole: bool = True
) -> NDArray[np.float32]:
    """Decode samples `start` to `end`, at the file's own rate, as mono `[sample]`.

    Fewer are an error only if `whole`.
    """
    if end > sound.frames:
        raise _truncated(piece, f"needs {end} samples, the header states {sound.frames}")
    try:
        audio = read_frames(sound, start, end - start)
    except (soundfile.SoundFileError, OSError) as error:
        raise _truncated(piece, _cause(error)) from None
    if whole and len(audio) < end - start:
        raise _truncated(piece, f"{len(audio)} samples of {end - start} could be decoded")
    mono = audio[:, 0] if audio.shape[1] == 1 else audio.mean(axis=1)
    return np.ascontiguousarray(mono, dtype=np.float32)


def _resample(sound: soundfile.SoundFile, piece: Piece) -> NDArray[np.float32]:
    """Decode a piece of another rate with a margin, resample it, then trim the margin."""
    rate = int(sound.samplerate)
    divisor = math.gcd(rate, SAMPLE_RATE)
    # Both rates have a sample at the same instant only at multiples of these steps. Starting at one
    # gives the same phase as resampling the whole file.
    source_step, target_step = rate // divisor, SAMPLE_RATE // divisor
    margin = math.ceil(_MARGIN * rate)
    steps = max(0, piece.start * rate // SAMPLE_RATE - margin) // source_step
    end = -(-(piece.start + piece.samples) * rate // SAMPLE_RATE)
    if end > sound.frames + math.ceil(_PADDING * rate / SAMPLE_RATE):
        raise _truncated(piece, f"needs {end} samples, the header states {sound.frames}")
    # Where the length is not stated, the margin may lie behind the end.
    last, whole = min(end + margin, sound.frames), is_stated(sound)
    audio = _decode(sound, piece, steps * source_step, last, whole)
    resampled = soxr.resample(audio, rate, SAMPLE_RATE, quality="HQ")
    first = piece.start - steps * target_step
    chosen = resampled[first : first + piece.samples]
    missing = piece.samples - len(chosen)
    if missing > _PADDING:
        raise _truncated(piece, f"{len(chosen)} samples of {piece.samples} after resampling")
    return np.pad(chosen, (0, missing)).astype(np.float32, copy=False)


def _cause(error: Exception) -> str:
    """The message of libsndfile without the path."""
    return str(getattr(error, "error_string", error)).rstrip(".")


def _truncated(piece: Piece, detail: str) -> BadAudio:
    return BadAudio(
        "truncated", piece.path, f"ends early or is damaged ({detail}); download it again"
    )
