"""Speaker identification and verification on VoxCeleb1.

torchaudio's readers download missing lists, and do not check that the files in them exist.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from common.errors import DataError, UsageError
from partitions.manifest import Piece, path_problem
from partitions.sampling import SAMPLE_RATE
from partitions.skips import Skips
from ssl_core.downstream.clips import Clip, TaskData, Trial
from ssl_core.downstream.corpora.corpus_files import (
    check_folder,
    folders,
    headers,
    lengths,
    lines_of,
    names,
    other_layout,
    task_data,
)
from ssl_core.training.randomness import generator

CORPUS = "VoxCeleb1"
LAYOUT = "wav/idXXXXX/video/number.wav with veri_test.txt or iden_split.txt beside wav"
TRIALS = "veri_test.txt"
IDENTIFICATION = "iden_split.txt"
VALID_FRACTION = 0.1
"""Fraction of every speaker's utterances to validate on; the paper takes a random tenth."""

CHUNK_SECONDS = 3.0
"""Length of training chunks (SpeechBrain's VoxCeleb recipes)."""

Split = Literal["paper", "official"]

_PARTS = {"1": "train", "2": "valid", "3": "test"}


def read_identification(
    root: Path,
    seed: int = 0,
    split: Split = "paper",
    seconds: float = CHUNK_SECONDS,
    progress: bool = False,
) -> TaskData:
    """List the clips of VoxCeleb1, labelled by speaker.

    Args:
        root: the folder that holds `wav` and the lists, its parent with `VoxCeleb1/`, or `wav`.
        seed: for the paper's split.
        split: "paper" uses the speakers that are in no trial of `veri_test.txt` (1211 in the
            whole corpus), and validates on a random tenth of the utterances of each, at least one
            if there are two. Accuracy is reported on those, so `test` has the same clips; `train`
            may have other utterances of the same video. "official" is `iden_split.txt`.
        seconds: length of the chunks that `train` is cut into; 0 keeps whole files.
        progress: show a progress bar on stderr if that is a terminal.

    Clips of `valid` and `test` are whole files. `skips` counts files that are missing, unreadable
    or empty.

    Raises:
        UsageError: an unknown split.
        DataError: wrong layout, a missing list, an invalid line in a list, or fewer than two
            speakers.
    """
    if split not in ("paper", "official"):
        raise UsageError(f"no split '{split}' of {CORPUS}: choose paper or official")
    folder = _locate(root)
    skips = Skips({}, {})
    if split == "official":
        train, valid, test = _official(folder, skips, progress)
    else:
        tested = _speakers_of(_trials(folder))
        train, valid = _paper_split(folder, tested, seed, skips, progress)
        test = valid
    return _identification(folder, train, valid, test, skips, seconds)


def read_verification(
    root: Path, seed: int = 0, seconds: float = CHUNK_SECONDS, progress: bool = False
) -> TaskData:
    """List the clips of VoxCeleb1 for training embeddings, and the trials of `veri_test.txt`.

    `train` and `valid` are those of `read_identification` with the paper's split, whose speakers
    are in no trial; `test` has each file of the trials once, sorted.

    Args:
        root: as in `read_identification`.
        seed: for choosing the utterances to validate on.
        seconds: length of the chunks that `train` is cut into; 0 keeps whole files.
        progress: show a progress bar on stderr if that is a terminal.

    Raises:
        DataError: as `read_identification`; also if all trials are of the same speaker or all of
            different speakers, or a file of a trial is missing, unreadable or empty.
    """
    folder = _locate(root)
    numbered = _trials(folder)
    trials = tuple(numbered.values())
    for same in (True, False):
        if all(trial.same != same for trial in trials):
            kind = "the same speaker" if same else "different speakers"
            raise DataError(
                f"{folder / TRIALS}: no trial of {kind}, which the equal error rate needs; "
                f"download the list again"
            )
    found = headers(folder, sorted(_files_of(trials)), progress)
    bad = {path: reason for path, reason in found.items() if isinstance(reason, str)}
    for number, trial in numbered.items():
        for path in (trial.first, trial.second):
            if path in bad:
                raise DataError(
                    f"{folder / TRIALS}:{number}: {path} is {bad[path]} in {folder}; {len(bad)} "
                    f"of the {len(found)} files in trials cannot be used: unpack the test set of "
                    f"{CORPUS} there"
                )
    skips = Skips({}, {})
    tested = _speakers_of(numbered)
    train, valid = _paper_split(folder, tested, seed, skips, progress)
    test = [
        Clip(Piece(path, 0, samples), _speaker(path), _speaker(path))
        for path, samples in found.items()
        if isinstance(samples, int)
    ]
    return _identification(folder, train, valid, test, skips, seconds, trials)


def chunks(clip: Clip, seconds: float = CHUNK_SECONDS) -> list[Clip]:
    """Cut a clip into chunks of `seconds` that do not overlap.

    A shorter remainder is dropped; a clip that is not longer than a chunk is returned as it is.

    Raises:
        UsageError: chunks without a sample.
    """
    samples = round(seconds * SAMPLE_RATE)
    if samples < 1:
        raise UsageError(f"chunks of {seconds:g} s hold no audio; choose a length such as 3")
    piece = clip.piece
    if piece.samples <= samples:
        return [clip]
    return [
        Clip(
            Piece(piece.path, piece.start + n * samples, samples),
            clip.speaker,
            clip.label,
            clip.text,
        )
        for n in range(piece.samples // samples)
    ]


def _identification(
    root: Path,
    train: list[Clip],
    valid: list[Clip],
    test: list[Clip],
    skips: Skips,
    seconds: float,
    trials: tuple[Trial, ...] = (),
) -> TaskData:
    labels = tuple(sorted({clip.label for clip in train}))
    if len(labels) < 2:
        raise DataError(
            f"clips of {len(labels)} speakers to train on in {root}, two are needed; unpack the "
            f"development set of {CORPUS} there"
        )
    if seconds:
        train = [chunk for clip in train for chunk in chunks(clip, seconds)]
    return task_data(root, train, valid, test, labels, skips, trials)


def _locate(root: Path) -> Path:
    check_folder(root, CORPUS)
    places = [root, root / "VoxCeleb1"]
    if root.name == "wav":
        places.append(root.parent)
    for folder in places:
        if any(_is_speaker(name) for name in folders(folder / "wav")):
            return folder
    raise other_layout(root, CORPUS, LAYOUT)


def _is_speaker(name: str) -> bool:
    return name.startswith("id") and name[2:].isdecimal()


def _speaker(path: str) -> str:
    """Speaker of a file, from its path relative to the corpus root."""
    return path.split("/")[1]


def _path(name: str, where: str) -> str:
    """Path relative to the corpus root of a file in a list."""
    path = f"wav/{name}"
    problem = path_problem(path)
    if problem is None and (len(path.split("/")) != 4 or not _is_speaker(_speaker(path))):
        problem = f"'{name}' is not idXXXXX/video/number.wav"
    if problem:
        raise DataError(f"{where}: {problem}; download the list again")
    return path


def _trials(root: Path) -> dict[int, Trial]:
    """Trials by line number."""
    advice = f"it is part of {CORPUS}: download it and put it beside wav"
    trials = {}
    for number, line in lines_of(root / TRIALS, advice):
        where = f"{root / TRIALS}:{number}"
        columns = line.split()
        if len(columns) != 3 or columns[0] not in ("0", "1"):
            raise DataError(f"{where}: expected 0 or 1 and two files; download the list again")
        first, second = (_path(name, where) for name in columns[1:])
        same = columns[0] == "1"
        if same != (_speaker(first) == _speaker(second)):
            raise DataError(
                f"{where}: {columns[0]} contradicts the speakers of {columns[1]} and {columns[2]}; "
                f"download the list again"
            )
        trials[number] = Trial(same, first, second)
    if not trials:
        raise DataError(f"{root / TRIALS}: no trial in it; download the list again")
    return trials


def _files_of(trials: Iterable[Trial]) -> set[str]:
    return {path for trial in trials for path in (trial.first, trial.second)}


def _speakers_of(trials: Mapping[int, Trial]) -> set[str]:
    return {_speaker(path) for path in _files_of(trials.values())}


def _paper_split(
    root: Path, tested: set[str], seed: int, skips: Skips, progress: bool
) -> tuple[list[Clip], list[Clip]]:
    """Utterances to train and to validate on, of the speakers that are not in `tested`."""
    paths = [
        f"wav/{speaker}/{video}/{name}"
        for speaker in folders(root / "wav")
        if _is_speaker(speaker) and speaker not in tested
        for video in folders(root / "wav" / speaker)
        for name in names(root / "wav" / speaker / video)
        if name.endswith(".wav")
    ]
    by_speaker: dict[str, list[Clip]] = {}
    for path, samples in lengths(root, _safe(paths, skips), skips, progress).items():
        speaker = _speaker(path)
        clip = Clip(Piece(path, 0, samples), speaker, speaker)
        by_speaker.setdefault(speaker, []).append(clip)
    train: list[Clip] = []
    valid: list[Clip] = []
    for speaker, clips in by_speaker.items():
        count = max(1, round(VALID_FRACTION * len(clips))) if len(clips) > 1 else 0
        order = generator(seed, "identification", speaker).permutation(len(clips))
        chosen = {int(index) for index in order[:count]}
        for index, clip in enumerate(clips):
            (valid if index in chosen else train).append(clip)
    return train, valid


def _safe(paths: Iterable[str], skips: Skips) -> list[str]:
    safe = []
    for path in paths:
        if path_problem(path):
            skips.add("name that cannot be written in a manifest", path)
        else:
            safe.append(path)
    return safe


def _official(
    root: Path, skips: Skips, progress: bool
) -> tuple[list[Clip], list[Clip], list[Clip]]:
    """Utterances to train, validate and test on according to `iden_split.txt`."""
    advice = f"it is part of {CORPUS}: download it and put it beside wav"
    part_of: dict[str, str] = {}
    for number, line in lines_of(root / IDENTIFICATION, advice):
        where = f"{root / IDENTIFICATION}:{number}"
        columns = line.split()
        if len(columns) != 2 or columns[0] not in _PARTS:
            raise DataError(f"{where}: expected 1, 2 or 3 and a file; download the list again")
        path = _path(columns[1], where)
        if path in part_of:
            raise DataError(f"{where}: {columns[1]} is listed twice; download the list again")
        part_of[path] = _PARTS[columns[0]]
    splits: dict[str, list[Clip]] = {"train": [], "valid": [], "test": []}
    for path, samples in lengths(root, sorted(part_of), skips, progress).items():
        splits[part_of[path]].append(Clip(Piece(path, 0, samples), _speaker(path), _speaker(path)))
    known = {clip.label for clip in splits["train"]}
    for part in ("valid", "test"):
        for clip in splits[part]:
            if clip.label not in known:
                skips.add("speaker without clips to train on", clip.piece.path)
        splits[part] = [clip for clip in splits[part] if clip.label in known]
    return splits["train"], splits["valid"], splits["test"]
