"""Parses and formats lengths, sizes and lists of names (`5s`, `8GB`, `a,b`)."""

import math
import re

from common.errors import UsageError

_LENGTH = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(ms|s|sec|m|min|h)?\s*", re.IGNORECASE)
_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?i?B?)\s*", re.IGNORECASE)
_SECONDS = {"ms": 1e-3, "s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class Seconds(float):
    """A length or duration in seconds, written as `5s`."""

    def __str__(self) -> str:
        """The shortest notation, as in `5s`."""
        return format_length(self)

    @classmethod
    def parse(cls, text: str | float) -> "Seconds":
        """Parse `5s`, `500ms`, `1.5min`, or a plain number of seconds.

        Raises:
            UsageError: the text is not a length, or not above zero.
        """
        match = _LENGTH.fullmatch(format_length(text) if isinstance(text, float) else str(text))
        if match is None:
            raise UsageError(f"'{text}' is not a length: write seconds, as in 5s or 15.8s")
        seconds = float(match[1]) * _SECONDS[(match[2] or "s").lower()]
        if not math.isfinite(seconds) or seconds <= 0:
            raise UsageError(
                f"a length of '{text}' holds no audio: it must be above zero, as in 5s"
            )
        return cls(seconds)


class Size(int):
    """A size in bytes, written as `8GB`, `512MiB` or `0`."""

    def __str__(self) -> str:
        """The size in the largest binary unit that divides it."""
        for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
            if self and self % 1024**power == 0:
                return f"{self // 1024**power}{unit}"
        return str(int(self))

    @classmethod
    def parse(cls, text: str | int) -> "Size":
        """Parse `8GB`, `512MiB`, `1.5G`, or a plain number of bytes.

        `GB` is 10**9 bytes and `GiB` (or `G`) is 2**30, as vendors and tools write them.

        Raises:
            UsageError: the text is not a size, or rounds to zero bytes without being `0`.
        """
        match = _SIZE.fullmatch(str(int(text)) if isinstance(text, int) else str(text))
        if match is None:
            raise UsageError(f"'{text}' is not a size: write bytes, as in 8GB or 512MiB")
        unit = match[2].upper()
        base = 1000 if unit.endswith("B") and "I" not in unit and unit != "B" else 1024
        size = int(float(match[1]) * base ** _POWERS[unit.rstrip("B").rstrip("I")])
        if size <= 0 and str(text).strip() != "0":
            raise UsageError(f"a size of '{text}' is empty: it must be above zero, as in 8GB")
        return cls(size)


class Names(tuple[str, ...]):
    """Names separated by commas: `train-clean-100,dev-clean`."""

    __slots__ = ()

    def __str__(self) -> str:
        """The names separated by commas."""
        return ",".join(self)

    @classmethod
    def parse(cls, text: "str | list[str] | tuple[str, ...]") -> "Names":
        """Parse names separated by commas, or a list of names."""
        names = text.split(",") if isinstance(text, str) else text
        return cls(str(name).strip() for name in names if str(name).strip())


def format_length(seconds: float) -> str:
    """Format a length in the shortest notation: `5s`, `15.8s`."""
    return f"{float(seconds):g}s"


def format_number(value: float | None, digits: int) -> str:
    """Format a number with `digits` after the point; `not finite` if there is none, as in logs."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def format_seconds(seconds: float) -> str:
    """Format a duration: `48 s`, `12.5 min`, `1.63 h`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.2f} h"


def format_bytes(size: float) -> str:
    """Format a size in powers of 1024: `362 MiB`, `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
