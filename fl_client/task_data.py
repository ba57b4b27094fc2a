"""Which labelled clips a client trains a task on, and which of its own it keeps as test clips."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common.errors import DataError, UsageError
from common.units import Names
from fl_client.client_state import ClientState
from fl_client.federation_settings import TaskFederation
from fl_client.local_data import client_key
from partitions.corpus_record import CorpusRecord
from partitions.manifest import Manifest
from partitions.sequences import Sequence as Voice
from partitions.sequences import Sequences
from partitions.speakers import How, partition
from ssl_core.downstream.clips import Clip
from ssl_core.downstream.task_corpus import read_task
from ssl_core.downstream.task_recipe import TaskRecipe
from ssl_core.training.randomness import generator

CONCENTRATION = 0.3
"""Of the Dirichlet distribution that `partition labels` draws label counts from."""


class Pool(NamedTuple):
    """All clips of a task's corpus, from every split."""

    root: Path
    labels: tuple[str, ...]
    clips: tuple[Clip, ...]
    skips: tuple[str, ...]


class ClientClips(NamedTuple):
    """A client's part of a pool."""

    key: int
    """The client's number: seeds its randomness and orders cohorts."""
    root: Path
    labels: tuple[str, ...]
    train: tuple[Clip, ...]
    test: tuple[Clip, ...]
    """Never trained on."""


@functools.lru_cache(maxsize=4)
def load_pool(
    task: str, root: Path, recipe: TaskRecipe, seed: int, subsets: tuple[str, ...]
) -> Pool:
    """All clips of a corpus without duplicates, ordered by name.

    Args:
        task: by name.
        root: of the corpus.
        recipe: of the task.
        seed: of what a split draws.
        subsets: of asr, which to read.

    Raises:
        UsageError: no corpus was named, or a subset does not exist.
        DataError: no usable corpus.
    """
    data = read_task(
        task, root, recipe, seed=seed, train=subsets, valid=(), test=(), progress=False
    )
    whole = {clip.name: clip for clip in (*data.test, *data.valid, *data.train)}
    clips = tuple(whole[name] for name in sorted(whole))
    skips = data.describe_skips()
    if not recipe.transcribes:  # such as speakers that occur in trials only
        known = set(data.labels)
        kept = tuple(clip for clip in clips if clip.label in known)
        if len(kept) < len(clips):
            skips.append(f"skipped, label without clips to train on: {len(clips) - len(kept)}")
        clips = kept
    return Pool(data.root, data.labels, clips, tuple(skips))


def divide_pool(
    pool: Pool, clients: int, how: str, seed: int, transcribes: bool
) -> tuple[tuple[Clip, ...], ...]:
    """Divide the clips among clients. Except with `speaker`, each gets two clips or more.

    Args:
        pool: clips of the corpus.
        clients: how many.
        how: `speaker`, `iid`, `skewed` or `labels`, as the setting `partition`.
        seed: of the division.
        transcribes: whether the task has transcripts instead of classes.

    Returns:
        The clips of each client.

    Raises:
        UsageError: too many clients for the clips, or `labels` for a task without classes.
    """
    if len(pool.clips) < 2 * clients:
        raise UsageError(
            f"{len(pool.clips)} clips are too few for {clients} clients: each needs two, one "
            "to train on and one to test on"
        )
    if how == "labels":
        if transcribes:
            raise UsageError("partition labels is for tasks with classes")
        return _by_labels(pool, clients, seed)
    voices = tuple(Voice(clip.speaker or clip.piece.path, (clip.piece,)) for clip in pool.clips)
    total = sum(voice.samples for voice in voices)
    manifest = Manifest(pool.root, 0.0, Sequences.of(voices), total)
    parts = partition(manifest, clients, _how(how), seed)
    divided = [[pool.clips[index] for index in part] for part in parts]
    return _topped_up(divided) if how == "skewed" else tuple(map(tuple, divided))


def _topped_up(divided: list[list[Clip]]) -> tuple[tuple[Clip, ...], ...]:
    """Move clips from the largest clients until each has two, to train and to test on."""
    for own in divided:
        while len(own) < 2:
            own.append(max(divided, key=len).pop())
    return tuple(tuple(sorted(own, key=lambda clip: clip.name)) for own in divided)


def _how(how: str) -> How:
    if how == "iid":
        return "iid"
    return "skewed" if how == "skewed" else "speaker"


def _by_labels(pool: Pool, clients: int, seed: int) -> tuple[tuple[Clip, ...], ...]:
    """Divide each label's clips by a Dirichlet distribution (Hsu et al., 2019)."""
    rng = generator(seed, "clients by labels", clients)
    by_label: dict[str, list[Clip]] = {label: [] for label in pool.labels}
    for clip in pool.clips:
        by_label[clip.label].append(clip)
    divided: list[list[Clip]] = [[] for _ in range(clients)]
    for clips in by_label.values():
        order = rng.permutation(len(clips))
        ends = np.cumsum(rng.dirichlet([CONCENTRATION] * clients)) * len(clips)
        bounds = [0, *np.round(ends).astype(int)]
        for own, first, last in zip(divided, bounds, bounds[1:], strict=False):
            own += [clips[int(place)] for place in order[first:last]]
    return _topped_up(divided)


def own_split(
    clips: Sequence[Clip], fraction: float, seed: int
) -> tuple[tuple[Clip, ...], tuple[Clip, ...]]:
    """Split a client's clips; labels with two clips or more occur on both sides.

    Args:
        clips: all clips of the client.
        fraction: of each label's clips to test on.
        seed: of the choice.

    Returns:
        The clips to train on and the clips to test on.

    Raises:
        DataError: the client has fewer than two clips.
    """
    by_label: dict[str, list[Clip]] = {}
    for clip in sorted(clips, key=lambda clip: clip.name):
        by_label.setdefault(clip.label, []).append(clip)
    train: list[Clip] = []
    test: list[Clip] = []
    for label, own in sorted(by_label.items()):
        order = generator(seed, "own test", label).permutation(len(own))
        count = min(len(own) - 1, max(1, round(fraction * len(own))))
        test += [own[int(place)] for place in order[:count]]
        train += [own[int(place)] for place in order[count:]]
    if not test and len(train) > 1:
        test.append(train.pop())
    if not test:
        raise DataError("a client needs two clips, one to train on and one to test on")
    return tuple(train), tuple(test)


def client_clips(
    node: Mapping[str, Any], settings: TaskFederation, state: ClientState | None = None
) -> ClientClips:
    """The part of a task's corpus that a node trains on.

    Args:
        node: as in `local_data.client_audio`.
        settings: of the run.
        state: of the client, which has the labels and test clips that the run began with. None
            takes those of the corpus as it is.

    Raises:
        UsageError: a speaker is not in the corpus.
        DataError: no usable corpus, or one that has changed since the run began so that the
            client's head or test clips no longer fit.
    """
    data = Path(str(node["data"])) if node.get("data") else settings.corpus()
    subsets = Names.parse(str(node.get("subset", ""))) or settings.subsets
    pool = load_pool(settings.task, data, settings.recipe, settings.seed, subsets)
    key, clips = client_key(node), pool.clips
    divided = "partition-id" in node and not node.get("speakers")
    if node.get("speakers"):
        wanted = set(Names.parse(str(node["speakers"])))
        unknown = sorted(wanted - {clip.speaker for clip in clips})
        if unknown:
            raise UsageError(f"--speakers: not in {pool.root}: {', '.join(unknown)}")
        clips = tuple(clip for clip in clips if clip.speaker in wanted)
    elif divided:
        count, transcribes = int(node["num-partitions"]), settings.recipe.transcribes
        clips = _parts(pool, count, settings.partition, settings.seed, transcribes)[key]
    train, test = own_split(clips, settings.own_test, settings.seed)
    if state is not None:
        train, test = _split_begun(state, pool, train, test, divided)
    return ClientClips(key, pool.root, pool.labels, train, test)


def _split_begun(
    state: ClientState,
    pool: Pool,
    train: tuple[Clip, ...],
    test: tuple[Clip, ...],
    divided: bool,
) -> tuple[tuple[Clip, ...], tuple[Clip, ...]]:
    """The clips to train and to test on, with those of the run's beginning still on their side.

    Clips that have come since are trained on.
    """
    begun = CorpusRecord(
        labels=state.begun("labels", pool.labels),
        clips=dict.fromkeys(state.begun("train", [clip.name for clip in train]), "train")
        | dict.fromkeys(state.begun("test", [clip.name for clip in test]), "test"),
    )
    clips = {clip.name: "train" for clip in train} | {clip.name: "test" for clip in test}
    now = CorpusRecord(labels=pool.labels, clips=clips if divided else None)
    changes = begun.changes(now)
    if changes:
        reason = "its part of the corpus" if divided else "its head"
        raise DataError(
            f"{pool.root} has changed since the run began, and {reason} no longer fits: {changes}. "
            f"Put the corpus back as it was, or delete {state.folder} to begin anew"
        )
    own = sorted((*train, *test), key=lambda clip: clip.name)
    kept = tuple(clip for clip in own if (begun.clips or {}).get(clip.name) == "test")
    rest = tuple(clip for clip in own if clip not in set(kept))
    if {clip.name for clip in kept} == {clip.name for clip in test}:
        return train, test  # in their own order, which decides the order of training
    if not kept or not rest:
        raise DataError(
            f"{pool.root} no longer has clips to train on and test clips of the run's beginning. "
            f"Put the corpus back as it was, or delete {state.folder} to begin anew"
        )
    return rest, kept


@functools.lru_cache(maxsize=4)
def _parts(
    pool: Pool, clients: int, how: str, seed: int, transcribes: bool
) -> tuple[tuple[Clip, ...], ...]:
    return divide_pool(pool, clients, how, seed, transcribes)
