"""A corpus scanned and recut, kept in the user's cache."""

import contextlib
import hashlib
from pathlib import Path

from common.cache_folder import cache_folder
from common.errors import DataError
from partitions.lengths import recut
from partitions.librispeech import find_utterances, list_audio
from partitions.manifest import FORMAT_VERSION, Manifest, read_manifest, write_manifest


def prepare(
    root: Path, subsets: tuple[str, ...] = (), length: float = 5.0, progress: bool = False
) -> Manifest:
    """Scan a corpus and recut it to `length` seconds, or take the result from the cache.

    The cache lies under `cache_folder()/manifests`, one file for each listing of the corpus (name,
    size and time of every audio file), subsets and length; a broken or unwritable cache is ignored.

    Raises:
        DataError: no corpus there, none of its audio is usable, or no speaker has `length` seconds.
        UsageError: an unknown subset.
    """
    listing = list_audio(root, subsets)
    digest = hashlib.sha256()
    for word in (FORMAT_VERSION, listing.root, *listing.subsets, repr(float(length))):
        digest.update(f"{word}\n".encode(errors="surrogateescape"))
    for file in listing.files:
        digest.update(f"{file.path}\t{file.size}\t{file.modified}\n".encode())
    for reason, count in listing.skips.items():
        digest.update(f"{reason}\t{count}\n".encode())
    cached = cache_folder() / "manifests" / f"{digest.hexdigest()[:32]}.tsv"
    with contextlib.suppress(DataError):
        return read_manifest(cached, listing.root)
    manifest = recut(find_utterances(root, subsets, progress), length)
    with contextlib.suppress(OSError, DataError):
        write_manifest(cached, manifest)
    return manifest
