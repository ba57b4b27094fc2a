"""The readable form of a manifest: text, one tab-separated line a sequence."""

import contextlib
import hashlib
import re
from array import array
from collections.abc import Iterator
from pathlib import Path

from common.atomic import replacing
from common.cache_folder import cache_folder
from common.errors import DataError
from partitions.columns import Columns, compact, kept
from partitions.manifest import FORBIDDEN, FORMAT_VERSION, Manifest, path_problem
from partitions.sampling import SAMPLE_RATE
from partitions.sequences import SequenceList

_TITLE = "# shortwave manifest"
_NUMBER = re.compile(r"[0-9]{1,15}")
_LENGTHS_A_LINE = 16
_LINES = 4096
"""Lines written at once."""
_LARGE = 2**20
"""Bytes of text from which the cache keeps a manifest in columns, for other readers."""
_DIGEST = 16


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write a manifest as text, atomically.

    Header lines start with `#`; then follows one tab-separated line for each sequence:
    `speaker path start samples [path start samples ...]`.

    Raises:
        DataError: a name with a character that the format does not allow, such as a tab.
        OSError: the disk is full or the folder cannot be written.
    """
    root = str(manifest.root.resolve())
    for name in (root, *manifest.speakers):
        if not name or FORBIDDEN.search(name):
            raise DataError(f"cannot write {path}: {name!r} has a character a manifest cannot hold")
    paths = _writable_paths(path, manifest)
    digest = hashlib.blake2b(digest_size=_DIGEST)
    written = 0
    with replacing(path) as partial, open(partial, "wb") as stream:
        for block in _blocks(manifest, paths):
            digest.update(block)
            written += stream.write(block)
    if written >= _LARGE:
        columns = _with_root(manifest, str(manifest.root.resolve()))
        kept(columns, _columns_of(digest.hexdigest()))


def _writable_paths(path: Path, manifest: Manifest) -> list[str]:
    """The paths of a manifest, if the format can hold all of them."""
    paths = list(manifest.sequences.paths)
    for each in paths:
        problem = path_problem(each)
        if problem:
            raise DataError(f"cannot write {path}: {problem}; rename that file")
    return paths


def _blocks(manifest: Manifest, paths: list[str]) -> Iterator[bytes]:
    """The lines of a manifest, some thousands at a time."""
    lines = [
        f"{_TITLE}\t{FORMAT_VERSION}",
        f"# sample rate\t{SAMPLE_RATE}",
        f"# length\t{manifest.length!r}",
        f"# root\t{manifest.root.resolve()}",
        f"# sequences\t{len(manifest.sequences)}",
        f"# total samples\t{manifest.total_samples}",
        f"# remainder samples\t{manifest.remainder_samples}",
        f"# remainder speakers\t{manifest.remainder_speakers}",
    ]
    for reason, count in manifest.skips.items():
        examples = manifest.skipped_examples.get(reason, ())
        lines.append("\t".join(["# skipped", reason, str(count), *examples]))
    lengths = manifest.utterance_lengths.tolist()
    for first in range(0, len(lengths), _LENGTHS_A_LINE):
        chosen = lengths[first : first + _LENGTHS_A_LINE]
        lines.append("\t".join(["# utterance samples", *map(str, chosen)]))
    speakers = list(manifest.sequences.speakers)
    for speaker, pieces in manifest.sequences.rows():
        columns = [f"\t{paths[file]}\t{start}\t{samples}" for file, start, samples in pieces]
        lines.append(speakers[speaker] + "".join(columns))
        if len(lines) >= _LINES:
            yield ("\n".join(lines) + "\n").encode()
            lines = []
    yield "".join(f"{line}\n" for line in lines).encode()


def read_manifest(path: Path, root: Path | None = None) -> Manifest:
    """Read a manifest; `root` replaces the corpus root written in it.

    Raises:
        DataError: the file is missing, not UTF-8, not a manifest, of another version, truncated or
            empty, or a line has an unsafe path, an invalid number or a missing column; the message
            names the file and the line.
    """
    try:
        digest = _digest(path)
        if digest:
            with contextlib.suppress(DataError):
                columns = Columns.open(_columns_of(digest))
                if root or columns.header["root"]:
                    return Manifest.of(columns, root or Path(columns.header["root"]))
        with open(path, "rb") as stream:
            reader = _Reader(path)
            for number, line in enumerate(stream, start=1):
                reader.take_bytes(number, line)
    except OSError as error:
        raise DataError(f"cannot read manifest {path}: {error.strerror}") from None
    manifest = reader.finish(root)
    if digest:
        columns = kept(_with_root(manifest, reader.header.get("root", "")), _columns_of(digest))
        return Manifest.of(columns, manifest.root)
    return manifest


def _digest(path: Path) -> str:
    """Digest of a large manifest's text; empty for a small one, which is as soon parsed."""
    if path.stat().st_size < _LARGE:
        return ""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, _hash).hexdigest()


def _hash() -> "hashlib._Hash":
    return hashlib.blake2b(digest_size=_DIGEST)  # type: ignore[return-value]


def _columns_of(digest: str) -> Path:
    """Where the cache has a manifest in columns, by the digest of its text."""
    return cache_folder() / "manifests" / f"text-{digest}.columns"


def _with_root(manifest: Manifest, root: str) -> Columns:
    """The manifest in columns, with the root that its text has."""
    columns = manifest.columns()
    return Columns(columns.header | {"root": root}, columns.arrays)


class _Reader:
    """Parses a manifest line by line; errors name the current line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = 0
        self.header: dict[str, str] = {}
        self.skips: dict[str, int] = {}
        self.examples: dict[str, tuple[str, ...]] = {}
        self.lengths = array("q")
        self.sequences = SequenceList()
        self.last: str | None = None
        """The last path, which is safe."""

    def fail(self, what: str) -> DataError:
        return DataError(f"{self.path}:{self.number}: {what}; write the manifest again")

    def take_bytes(self, number: int, line: bytes) -> None:
        self.number = number
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise DataError(
                f"{self.path}:{number}: not UTF-8 text; write the manifest again"
            ) from None
        text = text.removesuffix("\n").removesuffix("\r")
        if text:
            self.take(text)

    def take(self, line: str) -> None:
        if _TITLE[2:] not in self.header:
            if line.split("\t")[0] != _TITLE:
                raise self.fail(f"not a manifest (the first line must start with '{_TITLE}')")
            self.header[_TITLE[2:]] = line.partition("\t")[2]
            if self.header[_TITLE[2:]] != str(FORMAT_VERSION):
                raise self.fail(f"a manifest of another version than {FORMAT_VERSION}")
        elif line.startswith("#"):
            self.take_header(line)
        else:
            self.take_sequence(line)

    def take_header(self, line: str) -> None:
        key, *values = line.lstrip("# ").split("\t")
        if key == "skipped":
            if len(values) < 2:
                raise self.fail("'skipped' needs a reason and a count")
            self.skips[values[0]] = self.integer(values[1], "count", least=1)
            if values[2:]:
                self.examples[values[0]] = tuple(values[2:])
        elif key == "utterance samples":
            self.lengths.extend(self.integer(value, "length", least=1) for value in values)
        elif values:
            self.header[key] = values[0]

    def take_sequence(self, line: str) -> None:
        speaker, *columns = line.split("\t")
        if not speaker or FORBIDDEN.search(speaker):
            raise self.fail("no speaker in the first column")
        if not columns or len(columns) % 3:
            raise self.fail(
                "missing columns: a speaker, then path, start and samples of each piece"
            )
        for path, start, samples in zip(columns[::3], columns[1::3], columns[2::3], strict=True):
            problem = path_problem(path) if path != self.last else None
            if problem:
                raise self.fail(problem)
            self.last = path
            first = self.integer(start, "start", least=0)
            count = self.integer(samples, "samples", least=1)
            self.sequences.add_piece(self.sequences.path(path), first, count)
        self.sequences.end(self.sequences.speaker(speaker))

    def integer(self, text: str, name: str, least: int) -> int:
        if not _NUMBER.fullmatch(text) or int(text) < least:
            raise self.fail(f"{name} is '{text}', not a whole number from {least}")
        return int(text)

    def finish(self, root: Path | None) -> Manifest:
        if not len(self.sequences):
            raise DataError(f"{self.path}: an empty manifest, without sequences; recut the corpus")
        self.number = 1
        counts = {
            key: self.integer(self.header.get(key, ""), f"header '{key}'", least=0)
            for key in (
                "sample rate",
                "sequences",
                "total samples",
                "remainder samples",
                "remainder speakers",
            )
        }
        if counts["sample rate"] != SAMPLE_RATE:
            raise self.fail(f"positions at {counts['sample rate']} Hz, not {SAMPLE_RATE}")
        if counts["sequences"] != len(self.sequences):
            found = len(self.sequences)
            raise self.fail(f"truncated: {found} sequences of {counts['sequences']}")
        try:
            length = float(self.header.get("length", ""))
        except ValueError:
            length = 0.0
        if not 0 < length < float("inf"):
            raise self.fail("no header 'length' in seconds")
        if root is None and not self.header.get("root"):
            raise self.fail("no header 'root', the folder with the subsets")
        return Manifest(
            root=root if root is not None else Path(self.header["root"]),
            length=length,
            sequences=self.sequences.finish(),
            total_samples=counts["total samples"],
            remainder_samples=counts["remainder samples"],
            remainder_speakers=counts["remainder speakers"],
            skips=self.skips,
            skipped_examples=self.examples,
            utterance_lengths=compact(self.lengths),
        )
