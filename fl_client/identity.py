"""Who a device is: a random number, made once and kept in its state folder.

Neither hostname nor paths tell devices apart: cards written from one image have the same of both.
A copied state folder is noticed by the board's serial number, where it has one; the server notices
the rest (`fl_server/roster.py`).
"""

import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import IO, NamedTuple

from common.atomic import write_text
from common.errors import DataError, UsageError
from common.lock import Locked, lock

SMALLEST, LARGEST = 2**32, 2**53
"""Range of identities: above the numbers of partitions, and exact as a metric, a double."""
WAIT = 15.0
"""Seconds for which a ClientApp may outlive a device that was killed."""
_SERIAL = Path("/sys/firmware/devicetree/base/serial-number")


def default_folder() -> Path:
    """Where devices keep their state by default."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "shortwave"


class Identity(NamedTuple):
    """A device's identity."""

    number: int
    """Random, from `SMALLEST` to `LARGEST`."""
    note: str
    """What the owner should know; may be empty."""
    lock: IO[str] | None
    """Open as long as this device runs: no other may run with the same identity here."""


def identity(folder: Path, trains_on: str, former: int = 0, serial: Path = _SERIAL) -> Identity:
    """The identity of a device, made when it starts for the first time.

    Args:
        folder: the device's state folder.
        trains_on: data, subsets and speakers: devices that share a state folder but not these are
            different devices.
        former: number that version 0.1 gave this device; it is kept if there is state of it.
        serial: file with the board's serial number; may be missing.

    Raises:
        UsageError: a device with this identity is running on this machine.
        DataError: the file is not readable as one that this function wrote.
        OSError: the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    what = hashlib.sha256(trains_on.encode()).hexdigest()[:16]
    path = folder / f"identity-{what}.json"
    try:
        held = lock(path.with_suffix(".lock"), WAIT)
    except Locked:
        raise UsageError(
            f"a device that trains on the same data already runs here with the state in {folder}: "
            "end it, or give this one other data or a --state of its own"
        ) from None
    board = _digest(serial)
    kept = _read(path)
    if kept is not None and kept[1] in ("", board):
        return Identity(kept[0], "", held)
    number = SMALLEST + secrets.randbelow(LARGEST - SMALLEST)
    if kept is None and any(folder.glob(f"*/{former}")):
        number = former
    write_text(path, json.dumps({"identity": number, "board": board}) + "\n")
    note = (
        "a new device; its identity is kept"
        if kept is None
        else ("the state was copied from another board: this device gets an identity of its own")
    )
    return Identity(number, f"{note} in {path}", held)


def _read(path: Path) -> tuple[int, str] | None:
    """Number and board that are kept; None if there are none."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return int(kept["identity"]), str(kept["board"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        raise DataError(
            f"{path} does not hold this device's identity; remove it, and the device is a new one"
        ) from None


def _digest(serial: Path) -> str:
    """A digest of the board's serial number, which itself is kept nowhere; empty without one."""
    try:
        text = serial.read_bytes().strip(b"\0\n ")
    except OSError:
        return ""
    return hashlib.sha256(text).hexdigest()[:16] if text.strip(b"0") else ""
