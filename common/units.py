"""Parses and formats lengths (`5s`), sizes (`8GB`) and lists of names (`a, b`)."""

import math
import re

from common.errors import UsageError

_LENGTH = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(ms|s|sec|m|min|h)?\s*", re.IGNORECASE)
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?i?B?)\s*", re.IGNORECASE)
_SECONDS = {"ms": 1e-3, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_length(text: str | float) -> float:
    """Parse `5s`, `500ms`, `1.5min` or a plain number of seconds; returns seconds.

    Raises:
        UsageError: not a length, or not above zero.
    """
    match = _LENGTH.fullmatch(str(text))
    if match is None:
        raise UsageError(f"'{text}' is not a length: write seconds, as in 5s or 15.8s")
    seconds = float(match[1]) * _SECONDS[(match[2] or "s").lower()]
    if not math.isfinite(seconds) or seconds <= 0:
        raise UsageError(f"a length of '{text}' holds no audio: it must be above zero, as in 5s")
    return seconds


def parse_size(text: str | float) -> int:
    """Parse `8GB`, `512MiB`, `1.5G` or a plain number of bytes; returns bytes.

    `GB` is 10**9 bytes; `GiB` and `G` are 2**30 bytes.

    Raises:
        UsageError: not a size, or not above zero.
    """
    match = _SIZE.fullmatch(str(text))
    if match is None:
        raise UsageError(f"'{text}' is not a size: write bytes, as in 8GB or 512MiB")
    unit = match[2].upper()
    base = 1000 if unit.endswith("B") and "I" not in unit and unit != "B" else 1024
    size = int(float(match[1]) * base ** _POWERS[unit.rstrip("B").rstrip("I")])
    if size <= 0:
        raise UsageError(f"a size of '{text}' is empty: it must be above zero, as in 8GB")
    return size


def parse_names(text: str) -> tuple[str, ...]:
    """Split a text at commas; an empty text has no names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def format_length(seconds: float) -> str:
    """Seconds as a length in its shortest form: `5s`, `15.8s`."""
    return f"{seconds:g}s"


def format_seconds(seconds: float) -> str:
    """Seconds in a readable unit: `48 s`, `12.5 min`, `1.63 h`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.2f} h"


def format_bytes(size: float) -> str:
    """Bytes in a readable unit, in powers of 1024: `362 MiB`, `1.50 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
