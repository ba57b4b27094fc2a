"""Scans and recuts a corpus, with the result kept in the user's cache."""

import contextlib
import dataclasses
import hashlib
from pathlib import Path

from common.cache_folder import cache_folder
from common.errors import DataError
from partitions.fingerprints import contents, digest_of, fingerprints, is_unchanged
from partitions.librispeech import find_utterances, list_audio
from partitions.manifest import FORMAT_VERSION, Manifest, read_manifest, write_manifest
from partitions.recut import recut


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
    found = fingerprints(listing.root, listing.files, progress)
    files = contents(found)
    digest = hashlib.sha256()
    examples = listing.skipped_examples
    for word in (FORMAT_VERSION, *listing.subsets, repr(float(length)), digest_of(files)):
        digest.update(f"{word}\n".encode(errors="surrogateescape"))
    for reason, count in listing.skips.items():
        words = "\t".join([reason, str(count), *examples.get(reason, ())])
        digest.update(f"{words}\n".encode(errors="surrogateescape"))
    cached = cache_folder() / "manifests" / f"{digest.hexdigest()[:32]}.tsv"
    with contextlib.suppress(DataError):
        return dataclasses.replace(read_manifest(cached, listing.root), files=files)
    manifest = recut(find_utterances(root, subsets, progress), length)
    if all(is_unchanged(listing.root, path, each) for path, each in found.items() if each.content):
        with contextlib.suppress(OSError, DataError):
            write_manifest(cached, manifest)
    return dataclasses.replace(manifest, files=files)
