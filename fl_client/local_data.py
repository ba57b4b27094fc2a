"""Which audio a client trains on: its part of a corpus, without the held-out speakers."""

import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import UsageError
from common.units import Names
from fl_client.client_state import ClientState
from fl_client.federation_settings import PretrainingFederation
from partitions.demo_corpus import demo_corpus
from partitions.librispeech import corpus_folder
from partitions.manifest import Manifest
from partitions.manifest_text import read_manifest
from partitions.prepared import prepare
from partitions.sequences import Indices
from partitions.speakers import How, held_out_speakers, partition, select

log = logging.getLogger("shortwave.client")


class ClientAudio(NamedTuple):
    """A client's part of a corpus."""

    key: int
    """The client's number: seeds its randomness and orders cohorts."""
    manifest: Manifest
    indices: Indices
    """Into `manifest.sequences`, `[sequence]`."""


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
        return read_manifest(Path(manifest), corpus_folder(root))
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
) -> tuple[Indices, ...]:
    return partition(load_manifest(*source), clients, how, seed, excluded)


def client_key(node: Mapping[str, Any]) -> int:
    """A node's number: that of its partition, or its own."""
    if "partition-id" in node and not node.get("speakers"):
        return int(node["partition-id"])
    return int(node.get("client-key", 0))


def client_audio(
    node: Mapping[str, Any], settings: PretrainingFederation, state: ClientState | None = None
) -> ClientAudio:
    """The part of the corpus that a node trains on.

    Args:
        node: Flower's node config. `data` and `subset` override the run's. `speakers` (separated
            by commas), or `partition-id` with `num-partitions`, select a part; by default a node
            trains on all of its data. `client-key` is its number unless it has a `partition-id`.
        settings: of the run.
        state: of the client, which has the speakers held out when the run began: they still are if
            the corpus has changed since. None takes those of the corpus as it is.

    Raises:
        UsageError: a speaker is not in the corpus or is held out.
        DataError: no usable corpus.
    """
    data = Path(str(node["data"])) if node.get("data") else settings.data
    subsets = Names.parse(str(node.get("subset", ""))) or settings.subset
    source = (data, subsets, settings.length, str(node.get("manifest", "")))
    manifest = load_manifest(*source)
    key, excluded = client_key(node), held_out(manifest, settings)
    if state is not None:
        begun = state.begun("held out", excluded)
        if begun != excluded:
            log.warning(
                "%s has changed since the run began; the speakers held out then still are (%d)",
                manifest.root,
                len(begun),
            )
        excluded = begun
    if node.get("speakers"):
        wanted = Names.parse(str(node["speakers"]))
        unknown = sorted(set(wanted) - set(manifest.speakers))
        if unknown:
            raise UsageError(f"--speakers: not in {manifest.root}: {', '.join(unknown)}")
        kept = sorted(set(wanted) & set(excluded))
        if kept:
            raise UsageError(f"--speakers: held out for evaluation: {', '.join(kept)}")
        return ClientAudio(key, manifest, select(manifest, wanted))
    if "partition-id" in node:
        count = int(node["num-partitions"])
        parts = _parts(source, count, settings.partition, settings.seed, excluded)
        return ClientAudio(key, manifest, parts[key])
    speakers = sorted(set(manifest.speakers) - set(excluded))
    return ClientAudio(key, manifest, select(manifest, speakers))
