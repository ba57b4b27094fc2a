"""The record of a task's corpus that a run keeps (`partitions/corpus_record.py`)."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from partitions.corpus_record import CorpusRecord
from partitions.fingerprints import contents, fingerprints
from ssl_core.downstream.clips import Clip, Trial


def task_record(
    root: Path,
    splits: Mapping[str, Sequence[Clip]],
    labels: Sequence[str],
    *,
    backbone: str,
    trials: Sequence[Trial] = (),
) -> CorpusRecord:
    """The record of labelled clips and of how they are divided.

    Args:
        root: corpus root.
        splits: clips by the name of their split or client; a clip may be in several.
        labels: classes or symbols, in the order of the head's outputs.
        backbone: digest of the backbone that training begins from.
        trials: of verification.
    """
    clips: dict[str, str] = {}
    for split, members in splits.items():
        for clip in members:
            words = " ".join([split, clip.speaker, clip.label or _digest(clip.text)])
            clips[clip.name] = "; ".join(filter(None, [clips.get(clip.name), words]))
    for trial in trials:
        name = f"trial of {trial.first} and {trial.second}"
        clips[name] = "one speaker" if trial.same else "two speakers"
    everything = [clip for members in splits.values() for clip in members]
    paths = dict.fromkeys(clip.piece.path for clip in everything)
    return CorpusRecord(
        files=contents(fingerprints(root, paths, progress=True)),
        speakers=tuple(sorted({clip.speaker for clip in everything if clip.speaker})),
        labels=tuple(labels),
        clips=clips,
        backbone=backbone,
    )


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=8).hexdigest()
