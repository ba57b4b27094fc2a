"""Replays allocations as torch's CUDA caching allocator serves them.

Only by its order of allocations and frees does a step decide how much memory the allocator
reserves beside what is in use. The rules are those of c10/cuda/CUDACachingAllocator.cpp with its
default settings, the constants those of c10/core/AllocatorConfig.h (torch 2.11).
"""

import bisect

MIB = 2**20
SMALLEST = 512
"""Bytes to whose multiples all sizes are rounded."""
SMALL, SMALL_SEGMENT = MIB, 2 * MIB
"""Largest size that is served from small segments, and the size of these."""
SHARED, SHARED_SEGMENT = 10 * MIB, 20 * MIB
"""Larger sizes below `SHARED` are served from segments of this size."""
ROUNDED = 2 * MIB
"""All others have a segment each, of a multiple of this."""


class Piece:
    """A part of a segment, in use or free."""

    __slots__ = ("after", "before", "free", "pool", "size", "start")

    def __init__(self, pool: tuple[str, bool], start: int, size: int) -> None:
        """A piece in use.

        Args:
            pool: its name, and whether it is that of small pieces.
            start: address.
            size: bytes.
        """
        self.pool, self.start, self.size = pool, start, size
        self.free = False
        self.before: Piece | None = None
        self.after: Piece | None = None


class CachingAllocator:
    """The allocator of one device and stream; sizes in bytes."""

    def __init__(self) -> None:
        """Start with nothing reserved."""
        self.allocated = self.reserved = 0
        self.peak_reserved = 0
        self._next = 0
        self._free: dict[tuple[str, bool], list[tuple[int, int]]] = {}
        self._pieces: dict[int, Piece] = {}

    def allocate(self, size: int, pool: str = "") -> Piece:
        """Serve an allocation by the smallest free piece that suffices, else by a new segment.

        Args:
            size: bytes.
            pool: "" for the default pool, or the name of a graph's.
        """
        size = -(-max(size, 1) // SMALLEST) * SMALLEST
        key = (pool, size <= SMALL)
        free = self._free.setdefault(key, [])
        at = bisect.bisect_left(free, (size, -1))
        if at < len(free):
            piece = self._pieces[free.pop(at)[1]]
            piece.free = False
        else:
            piece = self._segment(key, size)
        if piece.size - size >= (SMALLEST if key[1] else SMALL + 1):
            self._split(piece, size)
        self.allocated += piece.size
        return piece

    def _segment(self, pool: tuple[str, bool], size: int) -> Piece:
        if pool[1]:
            whole = SMALL_SEGMENT
        else:
            whole = SHARED_SEGMENT if size < SHARED else -(-size // ROUNDED) * ROUNDED
        piece = self._pieces[self._next] = Piece(pool, self._next, whole)
        self._next += whole
        self.reserved += whole
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return piece

    def _split(self, piece: Piece, size: int) -> None:
        rest = Piece(piece.pool, piece.start + size, piece.size - size)
        rest.before, rest.after = piece, piece.after
        if piece.after is not None:
            piece.after.before = rest
        piece.after, piece.size = rest, size
        self._pieces[rest.start] = rest
        self._release(rest)

    def _release(self, piece: Piece) -> None:
        piece.free = True
        bisect.insort(self._free[piece.pool], (piece.size, piece.start))

    def _take_back(self, piece: Piece) -> None:
        free = self._free[piece.pool]
        free.pop(bisect.bisect_left(free, (piece.size, piece.start)))

    def free(self, piece: Piece) -> None:
        """Free a piece, and join it with free neighbours."""
        self.allocated -= piece.size
        before, after = piece.before, piece.after
        if after is not None and after.free:
            self._take_back(after)
            self._join(piece, after)
        if before is not None and before.free:
            self._take_back(before)
            self._join(before, piece)
            piece = before
        self._release(piece)

    def _join(self, piece: Piece, after: Piece) -> None:
        piece.size += after.size
        piece.after = after.after
        if after.after is not None:
            after.after.before = piece
        del self._pieces[after.start]

    def empty_cache(self) -> None:
        """Return the segments of the default pool in which nothing is in use."""
        for key, free in self._free.items():
            if key[0]:
                continue
            for size, start in list(free):
                piece = self._pieces[start]
                if piece.before is None and piece.after is None:
                    self._take_back(piece)
                    del self._pieces[start]
                    self.reserved -= size
