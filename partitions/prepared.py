"""Scans and recuts a corpus, with the result kept in the user's cache."""

import contextlib
import dataclasses
import hashlib
from pathlib import Path

import numpy as np

from common.cache_folder import cache_folder
from common.errors import DataError
from partitions.columns import Columns, kept
from partitions.librispeech import list_audio
from partitions.manifest import FORMAT_VERSION, Manifest
from partitions.recut import cut_recordings
from partitions.scan import contents_of, recordings_of, stamps_of


def prepare(
    root: Path, subsets: tuple[str, ...] = (), length: float = 5.0, progress: bool = False
) -> Manifest:
    """Scan a corpus and recut it, or read the result from the cache.

    The cache has one manifest in `cache_folder()/manifests` for each combination of audio files
    (path and content), subsets and length, wherever the corpus lies. A damaged or unwritable cache
    is ignored.

    Args:
        root: the corpus, see `find_utterances`.
        subsets: names of the subsets, see `find_utterances`.
        length: nominal length of the sequences, in seconds.
        progress: show a progress bar on stderr if that is a terminal.

    Raises:
        DataError: no corpus there, no usable audio, or no speaker with `length` seconds of audio.
        UsageError: an unknown subset.
    """
    listing = list_audio(root, subsets)
    stamps = stamps_of(listing)
    files, steady = contents_of(listing, stamps, progress)
    digest = hashlib.sha256()
    examples = listing.skipped_examples
    for word in (FORMAT_VERSION, *listing.subsets, repr(float(length)), files.digest):
        digest.update(f"{word}\n".encode(errors="surrogateescape"))
    for reason, count in listing.skips.items():
        words = "\t".join([reason, str(count), *examples.get(reason, ())])
        digest.update(f"{words}\n".encode(errors="surrogateescape"))
    cached = cache_folder() / "manifests" / f"{digest.hexdigest()[:32]}.columns"
    with contextlib.suppress(DataError):
        manifest = Manifest.of(Columns.open(cached), listing.root)
        return dataclasses.replace(manifest, files=files)
    manifest = cut_recordings(recordings_of(listing, progress), length)
    if steady and np.array_equal(stamps, stamps_of(listing)):
        columns = kept(manifest.columns(), cached)
        manifest = Manifest.of(columns, listing.root)
    return dataclasses.replace(manifest, files=files)
