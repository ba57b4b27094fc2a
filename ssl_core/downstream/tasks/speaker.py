"""VoxCeleb1: who speaks (identification), and whether two files are one voice (verification).

torchaudio's readers download a list that is missing, and pass on what it names unseen.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from common.errors import DataError, UsageError
from partitions.manifest import Piece, path_problem
from partitions.sampling import SAMPLE_RATE
from partitions.skips import Skips
from ssl_core.downstream.clips import Clip, TaskData, Trial
from ssl_core.downstream.tasks.files import (
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
VALID_SHARE = 0.1
"""Of every speaker's utterances, drawn; the paper validates on a random tenth."""

CHUNK_SECONDS = 3.0
"""What utterances are cut into for training (SpeechBrain's recipes of VoxCeleb)."""

Split = Literal["paper", "official"]

_PARTS = {"1": "train", "2": "valid", "3": "test"}


def read_identification(
    root: Path,
    seed: int = 0,
    split: Split = "paper",
    seconds: float = CHUNK_SECONDS,
    progress: bool = False,
) -> TaskData:
    """List the clips of VoxCeleb1 with the speaker as their label.

    Args:
        root: the folder that holds `wav` and the lists, its parent with `VoxCeleb1/`, or `wav`.
        seed: of the paper's split.
        split: "paper" takes the speakers that no trial of `veri_test.txt` names (1211 of the
            whole corpus) and validates on a random tenth of the utterances of each, at least one
            where there are two; accuracy is reported on those, so `test` holds the same clips.
            Other utterances of the same video may be in `train`. "official" is `iden_split.txt`.
        seconds: of the chunks that `train` is cut into; 0 leaves files whole.
        progress: show a progress bar on stderr where that is a terminal.

    Clips of `valid` and `test` are whole files. Files that are
    missing, unreadable or empty are counted in `skips`.

    Raises:
        UsageError: an unknown split.
        DataError: another layout, a list that is missing or has a line that makes no sense, or
            fewer than two speakers.
    """
    if split not in ("paper", "official"):
        raise UsageError(f"no split '{split}' of {CORPUS}: choose paper or official")
    folder = _locate(root)
    skips = Skips({}, {})
    if split == "official":
        train, valid, test = _official(folder, skips, progress)
    else:
        tested = _speakers_of(_trials(folder))
        train, valid = _tenth(folder, tested, seed, skips, progress)
        test = valid
    return _identification(folder, train, valid, test, skips, seconds)


def read_verification(
    root: Path, seed: int = 0, seconds: float = CHUNK_SECONDS, progress: bool = False
) -> TaskData:
    """List the clips of VoxCeleb1 to train an embedding on, and the trials of `veri_test.txt`.

    `train` and `valid` are those of the identification with the paper's split, whose speakers no
    trial names; `test` holds each file of the trials once, sorted. Arguments are those of
    `read_identification`.

    Raises:
        DataError: as `read_identification`; also trials that are all of one kind, or a trial of
            a file that is missing, unreadable or empty.
    """
    folder = _locate(root)
    numbered = _trials(folder)
    trials = tuple(numbered.values())
    for same in (True, False):
        if all(trial.same != same for trial in trials):
            kind = "the same voice" if same else "two voices"
            raise DataError(
                f"{folder / TRIALS}: no trial of {kind}, so there is no error rate; "
                f"download the list again"
            )
    found = headers(folder, sorted(_files_of(trials)), progress)
    bad = {path: reason for path, reason in found.items() if isinstance(reason, str)}
    for number, trial in numbered.items():
        for path in (trial.first, trial.second):
            if path in bad:
                raise DataError(
                    f"{folder / TRIALS}:{number}: {path} is {bad[path]} in {folder}; {len(bad)} "
                    f"of the {len(found)} files in trials cannot be used: unpack the test part of "
                    f"{CORPUS} there"
                )
    skips = Skips({}, {})
    tested = _speakers_of(numbered)
    train, valid = _tenth(folder, tested, seed, skips, progress)
    test = [
        Clip(Piece(path, 0, samples), _speaker(path), _speaker(path))
        for path, samples in found.items()
        if isinstance(samples, int)
    ]
    return _identification(folder, train, valid, test, skips, seconds, trials)


def chunks(clip: Clip, seconds: float = CHUNK_SECONDS) -> list[Clip]:
    """Cut a clip into chunks of `seconds` that do not overlap.

    A shorter remainder is dropped, unless it is all there is. A chunk is its own only chunk.

    Raises:
        UsageError: `seconds` is no length.
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
            f"development part of {CORPUS} there"
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
    """The speaker of a file by its path from the corpus root."""
    return path.split("/")[1]


def _path(name: str, where: str) -> str:
    """Path from the corpus root of a file as the lists name it."""
    path = f"wav/{name}"
    problem = path_problem(path)
    if problem is None and (len(path.split("/")) != 4 or not _is_speaker(_speaker(path))):
        problem = f"'{name}' is not idXXXXX/video/number.wav"
    if problem:
        raise DataError(f"{where}: {problem}; download the list again")
    return path


def _trials(root: Path) -> dict[int, Trial]:
    """The trials by the number of their line."""
    advice = f"it comes with {CORPUS}: download it, and put it beside wav"
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


def _tenth(
    root: Path, left_out: set[str], seed: int, skips: Skips, progress: bool
) -> tuple[list[Clip], list[Clip]]:
    """Utterances of the other speakers to train on, and a tenth of each one's to validate on."""
    paths = [
        f"wav/{speaker}/{video}/{name}"
        for speaker in folders(root / "wav")
        if _is_speaker(speaker) and speaker not in left_out
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
        count = max(1, round(VALID_SHARE * len(clips))) if len(clips) > 1 else 0
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
    """The utterances of `iden_split.txt` to train, validate and test on."""
    advice = f"it comes with {CORPUS}: download it, and put it beside wav"
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
