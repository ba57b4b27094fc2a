"""Keyword spotting on Speech Commands v2, with 35 words or 12 classes.

torchaudio's reader does not make the 12 classes, nor check that the files in the lists exist.
"""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from common.errors import DataError, UsageError
from partitions.manifest import Piece, path_problem
from partitions.sampling import SAMPLE_RATE
from partitions.skips import Skips
from ssl_core.downstream.clips import Clip, TaskData
from ssl_core.downstream.corpora.corpus_files import (
    check_folder,
    folders,
    lengths,
    lines_of,
    names,
    other_layout,
    task_data,
)
from ssl_core.training.randomness import generator

CORPUS = "Speech Commands v2"
LAYOUT = "word/speaker_nohash_number.wav with validation_list.txt and testing_list.txt"
COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
"""Words with a class of their own among the 12 (Warden 2018, section 7)."""

UNKNOWN = "unknown"
SILENCE = "silence"
EXTRA_EVERY = 10
"""Clips of commands per clip of "unknown" and of "silence"; the quotient is rounded up.

The published test set of 12 classes has 408 of each for 4074 clips of commands.
"""

NOISE = "_background_noise_"
NOISE_FRACTIONS = {"train": 0.6, "valid": 0.2, "test": 0.2}
"""Fractions of every noise file, in this order, from which the silence of a split is cut."""

_FOLDER = "speech_commands_v0.02"
_LISTS = {"valid": "validation_list.txt", "test": "testing_list.txt"}
_NAME = re.compile(r"([^_]+)_nohash_[0-9]+\.wav")

Splits = dict[str, list[Clip]]


def read(root: Path, words: int, seed: int = 0, progress: bool = False) -> TaskData:
    """List the clips of Speech Commands in the splits of its official lists.

    Args:
        root: the folder `speech_commands_v0.02`, or one that holds it.
        words: 35 for every word that has clips to train on; 12 for ten commands, "unknown" drawn
            from the other words, and "silence", pieces of 1 s of the background noises.
        seed: for choosing the clips of "unknown" and the pieces of "silence".
        progress: show a progress bar on stderr if that is a terminal.

    The speaker is the hash before `_nohash_`. The splits cut their silence from disjoint parts of
    every noise file (`NOISE_FRACTIONS`). `skips` counts files that are unreadable, empty or
    misnamed, and listed files that are missing.

    Raises:
        UsageError: `words` is neither 12 nor 35.
        DataError: wrong layout; a list that is missing or names an unsafe path; a file in both
            lists; no clips or no noise for one of the 12 classes.
    """
    if words not in (12, 35):
        raise UsageError(f"no keyword spotting with {words} words: choose 12 or 35")
    folder = _locate(root)
    skips = Skips({}, {})
    on_disk = _files(folder, skips)
    listed = _listed(folder, on_disk, skips)
    splits: Splits = {"train": [], "valid": [], "test": []}
    for path, samples in lengths(folder, on_disk, skips, progress).items():
        clip = Clip(Piece(path, 0, samples), on_disk[path], path.partition("/")[0])
        splits[listed.get(path, "train")].append(clip)
    if words == 35:
        labels = tuple(sorted({clip.label for clip in splits["train"]}))
        _skip_untrained(splits, set(labels), skips)
    else:
        labels = (*COMMANDS, UNKNOWN, SILENCE)
        splits = _twelve(folder, splits, seed, skips)
    return task_data(folder, splits["train"], splits["valid"], splits["test"], labels, skips)


def _locate(root: Path) -> Path:
    check_folder(root, CORPUS)
    for folder in (root, root / _FOLDER, root / "SpeechCommands" / _FOLDER):
        if any((folder / name).is_file() for name in _LISTS.values()):
            return folder
        for word in folders(folder):
            if any(_NAME.fullmatch(name) for name in names(folder / word)):
                return folder
    raise other_layout(root, CORPUS, LAYOUT)


def _files(folder: Path, skips: Skips) -> dict[str, str]:
    """Speakers by path of all files, sorted by word and name."""
    speakers = {}
    for word in folders(folder):
        if word == NOISE:
            continue
        for name in names(folder / word):
            path = f"{word}/{name}"
            match = _NAME.fullmatch(name)
            if match is None or path_problem(path):
                skips.add("name not speaker_nohash_number.wav", path)
            else:
                speakers[path] = match[1]
    return speakers


def _listed(folder: Path, on_disk: Mapping[str, str], skips: Skips) -> dict[str, str]:
    """Split by path of all files in the official lists."""
    split_of: dict[str, str] = {}
    for split, name in _LISTS.items():
        advice = f"it is part of {CORPUS} and defines the split: unpack the archive again"
        for number, line in lines_of(folder / name, advice):
            path = line.strip()
            problem = path_problem(path)
            if problem:
                raise DataError(f"{folder / name}:{number}: {problem}; {advice}")
            if split_of.get(path, split) != split:
                raise DataError(
                    f"{folder / name}:{number}: {path} is in {_LISTS[split_of[path]]} too; {advice}"
                )
            if path not in on_disk and path not in split_of:
                skips.add("missing", path)
            split_of[path] = split
    return split_of


def _skip_untrained(splits: Splits, trained: set[str], skips: Skips) -> None:
    for clips in splits.values():
        for clip in clips:
            if clip.label not in trained:
                skips.add("word without clips to train on", clip.piece.path)
        clips[:] = [clip for clip in clips if clip.label in trained]


def _twelve(folder: Path, splits: Splits, seed: int, skips: Skips) -> Splits:
    """The splits of the 12 classes: commands, and a clip of the other two per `EXTRA_EVERY`."""
    noises = _noises(folder, skips)
    chosen: Splits = {}
    for split, clips in splits.items():
        commands = [clip for clip in clips if clip.label in COMMANDS]
        lacking = [word for word in COMMANDS if word not in {clip.label for clip in commands}]
        if split == "train" and lacking:
            raise DataError(
                f"no clip of '{lacking[0]}' to train on in {folder}; the 12 classes need "
                f"{', '.join(COMMANDS)}: unpack {CORPUS} again"
            )
        wanted = math.ceil(len(commands) / EXTRA_EVERY)
        others = [clip for clip in clips if clip.label not in COMMANDS]
        if wanted and not others:
            raise DataError(
                f"no other words for the class '{UNKNOWN}' in the {split} split of {folder}; "
                f"unpack {CORPUS} again"
            )
        order = generator(seed, "unknown words", split).permutation(len(others))[:wanted]
        unknown = [others[index] for index in sorted(order)]
        chosen[split] = [
            *commands,
            *(Clip(clip.piece, clip.speaker, UNKNOWN) for clip in unknown),
            *_silence(folder, noises, split, wanted, seed),
        ]
    return chosen


def _noises(folder: Path, skips: Skips) -> dict[str, int]:
    """Samples of every noise file by path."""
    noise = [f"{NOISE}/{name}" for name in names(folder / NOISE) if name.endswith(".wav")]
    usable = lengths(folder, noise, skips)
    if not usable:
        raise DataError(
            f"no audio in {folder / NOISE}, from which the class '{SILENCE}' is cut; unpack "
            f"{CORPUS} again, or ask for 35 words"
        )
    return usable


def _silence(
    folder: Path, noises: Mapping[str, int], split: str, count: int, seed: int
) -> Iterable[Clip]:
    """Draw pieces of 1 s from a split's part of every noise file, sorted by path and start."""
    before = 0.0
    for name, fraction in NOISE_FRACTIONS.items():
        if name == split:
            break
        before += fraction
    stretches = []
    for path, samples in noises.items():
        first = round(before * samples)
        last = round((before + NOISE_FRACTIONS[split]) * samples)
        if last - first >= SAMPLE_RATE:
            stretches.append((path, first, last - first - SAMPLE_RATE + 1))
    starts = sum(available for _, _, available in stretches)
    if count and not starts:
        seconds = 1 / min(NOISE_FRACTIONS.values())
        raise DataError(
            f"no noise in {folder / NOISE} is long enough for the class '{SILENCE}' in the {split} "
            f"split: a file of at least {seconds:g} s is needed; unpack {CORPUS} again"
        )
    draws = generator(seed, "silence", split).choice(starts, size=count, replace=count > starts)
    for draw in sorted(int(each) for each in draws):
        position = draw
        for path, first, available in stretches:
            if position < available:
                yield Clip(Piece(path, first + position, SAMPLE_RATE), label=SILENCE)
                break
            position -= available
