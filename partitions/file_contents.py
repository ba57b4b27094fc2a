"""Fingerprints of a corpus' files by path, in columns."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

import numpy as np

from partitions.columns import Columns, Names, with_names

_SIZE = 16


class FileContents(Mapping[str, str]):
    """Fingerprint of each file by path, as columns."""

    def __init__(self, columns: Columns) -> None:
        """Take the columns that `of` makes."""
        self.columns, self.paths = columns, columns.names("path")

    @classmethod
    def of(cls, paths: Names, contents: bytes, known: bytes) -> "FileContents":
        """Collect fingerprints.

        Args:
            paths: of the files.
            contents: 16 bytes for each.
            known: for each, 1 or, if it cannot be read, 0.
        """
        arrays = {
            "content": np.frombuffer(contents, np.uint8).reshape(-1, 16),
            "known": np.frombuffer(known, np.uint8),
        }
        return cls(Columns({}, with_names(path=paths) | arrays))

    def named(self) -> "FileContents":
        """The same with the digest in the header, where it is found without being made again."""
        return FileContents(Columns({"digest": self.digest}, self.columns.arrays))

    @cached_property
    def digest(self) -> str:
        """That of `digest_of`."""
        return str(self.columns.header.get("digest") or digest_of(self))

    def rows(self) -> Iterator[tuple[str, str]]:
        """Paths and fingerprints in order."""
        return ((path, self._at(place)) for place, path in enumerate(self.paths))

    def sorted_rows(self) -> Iterator[tuple[str, str]]:
        """Paths and fingerprints, sorted by path."""
        paths, known = list(self.paths), self.columns["known"].tolist()
        contents = self.columns["content"].tobytes().hex()
        for place in sorted(range(len(paths)), key=paths.__getitem__):
            content = contents[32 * place : 32 * place + 32] if known[place] else ""
            yield paths[place], content

    def _at(self, place: int) -> str:
        known = self.columns["known"][place]
        return self.columns["content"][place].tobytes().hex() if known else ""

    @cached_property
    def _places(self) -> dict[str, int]:
        return {path: place for place, path in enumerate(self.paths)}

    def __getitem__(self, path: str) -> str:
        """Fingerprint of a file; empty if it cannot be read."""
        return self._at(self._places[path])

    def __iter__(self) -> Iterator[str]:
        """The paths in order."""
        return iter(self.paths)

    def __len__(self) -> int:
        """Number of files."""
        return len(self.paths)

    def __eq__(self, other: object) -> bool:
        """Whether paths and fingerprints are the same, in whatever order."""
        if not isinstance(other, Mapping):
            return NotImplemented
        if isinstance(other, FileContents):
            return self.digest == other.digest
        same = all(other.get(path) == content for path, content in self.rows())
        return same and len(self) == len(other)

    __hash__ = None  # type: ignore[assignment]


def sorted_rows(files: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Names and contents, sorted by name."""
    return files.sorted_rows() if isinstance(files, FileContents) else sorted(files.items())


def digest_of(files: Mapping[str, str]) -> str:
    """Digest of contents by path, in whatever order they are given."""
    digest = hashlib.blake2b(digest_size=_SIZE)
    for path, content in sorted_rows(files):
        digest.update(f"{path}\t{content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
