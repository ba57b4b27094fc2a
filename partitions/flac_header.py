"""Reads the length of a FLAC file from its header, which is much faster than opening a decoder.

The format is RFC 9639, sections 8 and 9.1. What it does not take is left to libsndfile: a length
that is not stated, a damaged header, other blocks, a depth that libsndfile refuses.
"""

import os

_HEAD = 512
_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
"""A pipe is not waited for."""
_STREAMINFO = b"\0\0\x22"
"""Length of the first block."""
_DEPTHS = (8, 16, 24)
"""Bits in a sample that libsndfile reads."""
_PADDING, _SEEK_TABLE, _COMMENT = 1, 3, 4
"""Kinds of metadata blocks that are understood."""


def flac_length(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Number of frames and sample rate of a FLAC file, or None if libsndfile must tell.

    Raises:
        OSError: the file cannot be read.
    """
    descriptor = os.open(path, _FLAGS)
    try:
        head = os.read(descriptor, _HEAD)
        if head[:4] != b"fLaC" or len(head) < 42 or head[5:8] != _STREAMINFO or head[4] & 0x7F:
            return None
        packed = int.from_bytes(head[18:26])
        rate, depth, frames = packed >> 44, (packed >> 36 & 31) + 1, packed & (2**36 - 1)
        if not rate or not frames or depth not in _DEPTHS:
            return None
        place, last = 42, head[4] & 0x80
        while not last:
            block = _at(descriptor, head, place, 4)
            size = int.from_bytes(block[1:])
            if len(block) < 4 or not _is_sound(descriptor, head, place + 4, block[0] & 0x7F, size):
                return None
            last = block[0] & 0x80
            place += 4 + size
        sync = _at(descriptor, head, place, 2)
        return (frames, rate) if sync in (b"\xff\xf8", b"\xff\xf9") else None
    finally:
        os.close(descriptor)


def _is_sound(descriptor: int, head: bytes, place: int, kind: int, size: int) -> bool:
    """Whether libsndfile reads a metadata block without complaint.

    Args:
        descriptor: of the file.
        head: its first bytes.
        place: of the block's content.
        kind: of the block.
        size: of the content, in bytes.
    """
    if kind == _SEEK_TABLE:
        return size % 18 == 0
    if kind != _COMMENT:
        return kind == _PADDING
    content = _at(descriptor, head, place, size)
    end = 4 + int.from_bytes(content[:4], "little")
    count = int.from_bytes(content[end : end + 4], "little")
    end += 4
    while count and end < size:
        end += 4 + int.from_bytes(content[end : end + 4], "little")
        count -= 1
    return count == 0 and end == size == len(content)


def _at(descriptor: int, head: bytes, place: int, size: int) -> bytes:
    """Bytes at a place of the file, which begins with `head`."""
    if place + size <= len(head):
        return head[place : place + size]
    os.lseek(descriptor, place, os.SEEK_SET)
    return os.read(descriptor, size)
