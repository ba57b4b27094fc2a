"""Which audio a client trains on: its part of a corpus, without the held-out speakers."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UsageError
from common.units import Names
from fl_client.federation_settings import PretrainingFederation
from partitions.demo_corpus import demo_corpus
from partitions.manifest import Manifest, read_manifest
from partitions.prepared import prepare
from partitions.speakers import How, held_out_speakers, partition, select


class ClientAudio(NamedTuple):
    """A client's part of a corpus."""

    key: int
    """The client's number: seeds its randomness and orders cohorts."""
    manifest: Manifest
    indices: tuple[int, ...]
    """Into `manifest.sequences`."""


@functools.lru_cache(maxsize=4)
def load_manifest(
    data: Path | None, subsets: tuple[str, ...], seconds: float, manifest: str
) -> Manifest:
    """The recut corpus.

    Args:
        data: root of the corpus; None for the demo corpus.
        subsets: subsets to read; empty for all.
        seconds: length of a sequence.
        manifest: an existing manifest file of the corpus, or empty.

    Raises:
        DataError: no usable corpus.
    """
    root = data or demo_corpus(progress=False)
    if manifest:
        return read_manifest(Path(manifest), root)
    return prepare(root, subsets, seconds)


def held_out(manifest: Manifest, settings: PretrainingFederation) -> tuple[str, ...]:
    """Speakers kept for evaluation, on which no client trains."""
    if not settings.held_out:
        return ()
    return held_out_speakers(manifest, settings.held_out, settings.seed)


@functools.lru_cache(maxsize=4)
def _parts(
    source: tuple[Path | None, tuple[str, ...], float, str],
    clients: int,
    how: How,
    seed: int,
    excluded: tuple[str, ...],
) -> tuple[tuple[int, ...], ...]:
    return partition(load_manifest(*source), clients, how, seed, excluded)


def client_audio(node: Mapping[str, Any], settings: PretrainingFederation) -> ClientAudio:
    """The part of the corpus that a node trains on.

    Args:
        node: Flower's node config. `data` and `subset` override the run's. `speakers` (separated
            by commas), or `partition-id` with `num-partitions`, select a part; by default a node
            trains on all of its data. `client-key` is its number unless it has a `partition-id`.
        settings: of the run.

    Raises:
        UsageError: a speaker is not in the corpus or is held out.
        DataError: no usable corpus.
    """
    data = Path(str(node["data"])) if node.get("data") else settings.data
    subsets = Names.parse(str(node.get("subset", ""))) or settings.subset
    source = (data, subsets, settings.length, str(node.get("manifest", "")))
    manifest = load_manifest(*source)
    excluded = held_out(manifest, settings)
    if node.get("speakers"):
        wanted = Names.parse(str(node["speakers"]))
        unknown = sorted(set(wanted) - set(manifest.speakers))
        if unknown:
            raise UsageError(f"--speakers: not in {manifest.root}: {', '.join(unknown)}")
        kept = sorted(set(wanted) & set(excluded))
        if kept:
            raise UsageError(f"--speakers: held out for evaluation: {', '.join(kept)}")
        return ClientAudio(
            int(node.get("client-key", 0)), manifest, tuple(select(manifest, wanted))
        )
    if "partition-id" in node:
        key, count = int(node["partition-id"]), int(node["num-partitions"])
        parts = _parts(source, count, settings.partition, settings.seed, excluded)
        return ClientAudio(key, manifest, parts[key])
    speakers = sorted(set(manifest.speakers) - set(excluded))
    return ClientAudio(int(node.get("client-key", 0)), manifest, tuple(select(manifest, speakers)))
